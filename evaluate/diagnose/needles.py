"""Texts with something hidden in them that is asked for at their end, and how far a model is from its base on them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

# What stands before the text, is hidden in it and follows it; the number comes behind.
FORMS = (
    (
        "There is important information hidden in the text below. Find it and remember it.\n\n",
        " The pass key is {key}. Remember it. {key} is the pass key. ",
        "\n\nWhat is the pass key? The pass key is",
    ),
    (
        "Read the text and remember the secret number in it.\n\n",
        " The secret number is {key}. Do not forget it. ",
        "\n\nWhat is the secret number? The secret number is",
    ),
    (
        "",
        " By the way, the code of the safe is {key}. The code is {key}. ",
        "\n\nQuestion: what is the code of the safe?\nAnswer: the code of the safe is",
    ),
)
SMALLEST, LARGEST = 10_000, 99_999


@dataclass(frozen=True)
class Hidden:
    """A text with a number hidden in it.

    Attributes:
        ids: `[1, T]` int64, question and answer included.
        answers: `[n]` int64, places of the tokens whose next one belongs to the answer.
        others: `[m]` int64, places of some other tokens.
    """

    ids: Tensor
    answers: Tensor
    others: Tensor


class Needles:
    """What hides numbers in texts; where, and which, is drawn from torch's global generator.

    Args:
        tokenizer: of the model.
        others: tokens of each text, besides those of the answer, that count.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, others: int = 192) -> None:
        self.tokenizer = tokenizer
        self.others = others

    def hide(self, ids: Tensor) -> Hidden:
        """Hide a number somewhere in `[T]` tokens of a text, and ask for it; the result is as long, if it can be."""
        before, needle, question = FORMS[int(torch.randint(len(FORMS), ()))]
        key = str(int(torch.randint(SMALLEST, LARGEST + 1, ())))
        pieces = [self._tokens(part.format(key=key)) for part in (before, needle, question, f" {key}")]
        room = max(2, len(ids) - sum(map(len, pieces)))
        # A first token of its own, which begins every text, stays the first.
        start = 1 if int(ids[0]) == self.tokenizer.bos_token_id else 0
        text = ids[:room].tolist()
        cut = int(torch.randint(start, max(start + 1, len(text)), ()))
        parts = [text[:start], pieces[0], text[start:cut], pieces[1], text[cut:], pieces[2], pieces[3]]
        joined = torch.tensor([token for part in parts for token in part])
        first = len(joined) - len(pieces[3]) - 1
        chosen = torch.randperm(first)[: self.others].sort().values
        return Hidden(joined[None], torch.arange(first, len(joined) - 1), chosen)

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []


def divergences(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of logits `[..., vocabulary]`, in nats and fp32: `[...]`."""
    target, guess = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (target.exp() * (target - guess)).sum(-1)


def mean_rows(rows: Sequence[Tensor]) -> float:
    """Mean of some scalars."""
    return float(torch.stack(list(rows)).mean())
