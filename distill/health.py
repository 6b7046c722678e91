"""Whether a model is still one: perplexities that are no number, weights not finite, stages that did harm."""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..convert.reading.shards import Shard
from ..convert.reading.weight_files import FLOAT_TYPES
from ..errors import TrainingError
from ..formats import count, number, ratio
from ..recipes import DataSection
from .data import name_of
from .packing import Position

logger = logging.getLogger(__name__)

# A stage that ends with more than this times the perplexity it began with has gone wrong.
WORSE = 1.5
# So many times further from its base than at its first positions is a model that is of no use there.
LOST = 1.5
# So many rounds through the same data mostly teach them by heart.
MANY_EPOCHS = 10
# Sequences that are shorter than this share of the model's positions say little about its long texts.
SHORT = 0.25


def check_perplexity(perplexity: float, label: str) -> None:
    """Refuse a model that predicts nothing.

    Args:
        perplexity: what was measured.
        label: the moment of the run: `teacher`, `swap` or a stage.

    Raises:
        TrainingError: the perplexity is NaN or infinite.
    """
    if math.isfinite(perplexity):
        return
    where = "before anything of it was changed" if label == "teacher" else f"after {label}"
    raise TrainingError(
        f"The model's perplexity is {perplexity} {where}, so it is not saved: its weights or activations overflow; "
        "output.dtype bfloat16 or float32, precision: fp32 or a lower learning_rate may help"
    )


def warn_if_worse(measured: Mapping[str, Any], before: str, after: str) -> None:
    """Warn where a stage left the model worse than it found it.

    Args:
        measured: what the run measured, perplexities under `perplexity/<label>`.
        before: label of the moment at which the stage began.
        after: label of the stage.
    """
    first, last = (measured.get(f"perplexity/{label}", {}).get("perplexity") for label in (before, after))
    if first is None or last is None or last <= WORSE * first:
        return
    logger.warning(
        "THE STAGE %s MADE THE MODEL WORSE: it began at a perplexity of %s and ended at %s, %s as much. "
        "Lower its learning_rate, or leave the stage out.",
        after,
        number(first),
        number(last),
        ratio(last / first, 3),
    )


def warn_if_lost_behind(base: Mapping[str, float], found: Mapping[str, float]) -> None:
    """Warn where a model is much further from its base at late positions than at early ones.

    Args:
        base: the base's perplexity by stretch of positions, such as `512-1024`, in their order.
        found: that of the model.
    """
    times = {name: found[name] / base[name] for name in base}
    first, nearest = next(iter(times.items()))
    for name, ratio_here in times.items():
        if not ratio_here <= LOST * nearest:
            logger.warning(
                "The model falls apart behind position %s: its perplexity is %s the base's at positions %s, and %s at "
                "%s. Heal it on longer sequences, or say so to whom you give it.",
                count(int(name.partition("-")[0])),
                ratio(ratio_here, 3),
                name,
                ratio(nearest, 3),
                first,
            )
            return


def warn_if_repeated(stage: str, section: DataSection, before: Position, after: Position) -> None:
    """Say, once, that a stage has used its data up many times.

    Args:
        stage: what messages call the stage.
        section: its data.
        before: place in the data before a step.
        after: place behind it.
    """
    if before.epoch < MANY_EPOCHS <= after.epoch:
        source = name_of(section)
        logger.warning(
            "%s has read %s %d times: from here on it mostly learns them by heart; give it more data or fewer tokens",
            stage,
            source[0].lower() + source[1:],
            MANY_EPOCHS,
        )


def warn_about_lengths(lengths: Mapping[str, int | None], positions: int | None) -> None:
    """Say that sequences are longer than the positions that the model was made for, or the last stage's much shorter.

    What is healed on short texts falls apart behind them, and perplexity at that length does not show it.

    Args:
        lengths: tokens of the longest sequences of each stage, by what messages call it; None for images.
        positions: `max_position_embeddings` of the model, None if it does not say.
    """
    for left, (stage, length) in zip(reversed(range(len(lengths))), lengths.items(), strict=True):
        if length is None or positions is None:
            continue
        if length > positions:
            logger.warning(
                "%s trains on sequences of %d tokens, but the model was made for %d positions: lower its "
                "sequence_length",
                stage,
                length,
                positions,
            )
        elif not left and length < SHORT * positions:
            logger.warning(
                "%s ends the healing on sequences of %d tokens, of %d that the model has positions for: what comes "
                "behind them is not healed; raise sequence_length, or look at it by `attnconv eval --suite long`",
                stage,
                length,
                positions,
            )


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse to save weights that are not finite.

    Raises:
        TrainingError: a tensor holds NaN or infinity.
    """
    for name, tensor in tensors:
        if not is_finite(tensor):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise TrainingError(
                f"{name} holds values that are not finite in {dtype}, so the model is not saved: another output.dtype "
                "may hold them, if the base's own weights are finite"
            )


def warn_if_not_finite(shards: Iterable[Shard]) -> None:
    """Say which weight files hold NaN or infinity, which a conversion takes over as they are."""
    from safetensors import safe_open

    for shard in shards:
        names = [name for name, tensor in shard.tensors.items() if tensor.dtype in FLOAT_TYPES]
        with safe_open(shard.path, "pt") as file:
            bad = [name for name in names if not is_finite(file.get_tensor(name))]
        if bad:
            logger.warning(
                "%s holds values that are not finite in %d tensors, first %s: they are in the converted model, too",
                shard.path,
                len(bad),
                bad[0],
            )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; one pass over it and no copy."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return True
    # Both take over a NaN, wherever it stands.
    low, high = tensor.detach().aminmax()
    return math.isfinite(float(low)) and math.isfinite(float(high))
