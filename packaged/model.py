"""What is packaged for trying things with no download: a small trained model and token ids sampled from it."""

from functools import cache
from pathlib import Path

import numpy as np
import torch

from ..errors import DataError

ASSETS = Path(__file__).parent / "assets"
SPLITS = ("train", "valid")


def embedded_model_path() -> Path:
    """The folder of the packaged model: stories260K, a Llama of 260,032 parameters, with its tokenizer."""
    return ASSETS / "stories260K"


def embedded_tokens(split: str = "train") -> torch.Tensor:
    """Token ids sampled from the packaged model.

    Args:
        split: `"train"` (3,600 rows) or `"valid"` (400 rows).

    Returns:
        `[rows, 384]` int64; each row begins with the token that begins a story, and most end inside one.

    Raises:
        DataError: there is no such split.
    """
    if split not in SPLITS:
        raise DataError(f'The embedded sample has no split "{split}"; use one of: {", ".join(SPLITS)}.')
    return torch.from_numpy(_samples(split).astype(np.int64))


# Unpacking takes longer than what most callers do with it, and a run asks for it at the beginning of every stage.
@cache
def _samples(split: str) -> np.ndarray:
    with np.load(ASSETS / "samples.npz") as arrays:
        samples: np.ndarray = arrays[split]
        return samples
