"""The tokens on which a recipe measures perplexity."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..evaluate import load_tokens
from ..evaluate.tasks.packaged import data_file
from ..packaged.model import embedded_model_path, embedded_tokens
from ..recipes import EvaluateSection

# Of the novel, in whole windows; at least one.
NOVEL_TOKENS = 8192


@dataclass(frozen=True)
class Novel:
    """The packaged novel's beginning.

    Attributes:
        tokens: `[tokens]` int64.
        ends: positions at which stretches end that are told apart; windows are as long as the last says.
    """

    tokens: torch.Tensor
    ends: Sequence[int]


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


def novel_tokens(ends: Sequence[int], tokenizer: PreTrainedTokenizerBase, positions: float) -> Novel:
    """The packaged novel's beginning, for perplexity by position.

    Args:
        ends: `by_position` of an evaluate section.
        tokenizer: the model's tokenizer.
        positions: how many the model has; stretches behind them are left out, infinity for a model without an end.
    """
    inside = [end for end in ends if end < positions]
    if len(inside) < len(ends):
        inside.append(int(positions))
    limit = max(1, NOVEL_TOKENS // inside[-1]) * inside[-1]
    return Novel(load_tokens(data_file("book"), tokenizer, context=inside[-1], limit=limit), inside)
