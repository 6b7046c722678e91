"""The tokens on which a recipe measures perplexity."""

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..evaluate import load_tokens
from ..packaged.model import embedded_model_path, embedded_tokens
from ..recipes import EvaluateSection


def evaluation_tokens(section: EvaluateSection, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The tokens of an evaluate section, as `perplexity` takes them.

    Args:
        section: the recipe's section.
        tokenizer: the model's tokenizer.

    Returns:
        `[tokens]` of a file, or `[rows, tokens]` of the packaged sample, whose rows are separate texts; a tokenizer
        with another vocabulary than the sample's gets it as one text.

    Raises:
        DataError: the file cannot be read, or holds fewer than two tokens.
    """
    if section.path is not None:
        return load_tokens(section.path, tokenizer, context=section.context, field=section.field, limit=section.tokens)
    rows = embedded_tokens("valid")
    own = AutoTokenizer.from_pretrained(embedded_model_path())
    if own.get_vocab() == tokenizer.get_vocab():
        return rows
    text = "\n\n".join(own.batch_decode(rows.tolist(), skip_special_tokens=True))
    return torch.tensor(list(tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]))
