"""What is measured of a model before, between and after the stages that heal it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel

from ..attention_modules.paths import leaving_out, paths_of
from ..convert.surgery.head import evaluating
from ..evaluate import perplexity
from ..evaluate.tasks.perplexity import cut_windows, token_losses
from .distance import output_distance
from .health import check_perplexity, warn_if_lost_behind
from .run import Run
from .trainee import Trainee

# In one forward pass of a measurement; a small model spends half of a single short window on the calls themselves.
TOKENS_AT_ONCE = 1536


def measure(run: Run, model: PreTrainedModel, label: str, *, needed: bool = True) -> None:
    """Record the model's perplexity under a label, if the recipe asks for it and it was not done already.

    Args:
        run: the run.
        model: what to measure.
        label: the moment of the run.
        needed: whether a perplexity that is no number means that the model is of no use.

    Raises:
        TrainingError: it is.
    """
    section, tokens = run.recipe.evaluate, run.evaluation_tokens
    if section is None or tokens is None or f"perplexity/{label}" in run.measured:
        return
    run.progress.phase(f"Measuring perplexity: {label}")
    sizes: dict[str, Any] = {"context": section.context, "batch_size": max(1, TOKENS_AT_ONCE // section.context)}
    result = perplexity(model, tokens, limit=section.tokens, tokenizer=run.tokenizer, **sizes)
    run.progress.end()
    if needed:
        check_perplexity(result.perplexity, label)
    run.record(f"perplexity/{label}", asdict(result))


def measure_positions(run: Run, model: PreTrainedModel, label: str) -> None:
    """Record perplexity by position under a label, if the recipe asks for it and it was not done already.

    Args:
        run: the run.
        model: what to measure.
        label: the moment of the run; of `teacher` all others are multiples.
    """
    key, novel = f"positions/{label}", run.novel
    if novel is None or key in run.measured:
        return
    run.progress.phase(f"Measuring perplexity by position: {label}")
    found = perplexity_by_position(model, novel.tokens, novel.ends)
    run.progress.end()
    run.record(key, found)
    base: Mapping[str, float] | None = run.measured.get("positions/teacher")
    if base is not None and label != "teacher":
        warn_if_lost_behind(base, found)


@torch.inference_mode()
def perplexity_by_position(model: PreTrainedModel, tokens: torch.Tensor, ends: Sequence[int]) -> dict[str, float]:
    """Perplexity of the tokens at some positions of their windows, which are as long as the last of them says.

    Args:
        model: a causal language model; it is put into eval mode for the measurement.
        tokens: `[tokens]` int64.
        ends: positions at which stretches end, rising.

    Returns:
        perplexity by stretch, such as `0-512`.
    """
    windows = [window for window in cut_windows(tokens, ends[-1]) if window.numel() == ends[-1]]
    with evaluating(model):
        losses = torch.cat([token_losses(model, window[None].to(model.device)) for window in windows])
    # The token at position t is the prediction number t - 1.
    stretches = zip([0, *ends], ends, strict=False)
    return {f"{low}-{high}": float(losses[:, max(low - 1, 0) : high - 1].mean().exp()) for low, high in stretches}


def measure_path_use(run: Run, model: PreTrainedModel, label: str) -> None:
    """Record how many times the perplexity under a label the model's is without each path of its methods."""
    if f"perplexity/{label}" not in run.measured:
        return
    ratios = {}
    # Hybrids tend to bypass their linear path (https://arxiv.org/abs/2510.05901).
    for path in paths_of(model):
        without = f"{label}, without the {path} path"
        with leaving_out(model, path):
            measure(run, model, without, needed=False)
        intact, left = (run.measured[f"perplexity/{name}"]["perplexity"] for name in (label, without))
        ratios[path] = left / intact
    run.record("path_use", ratios)


def measure_distance(run: Run, trainee: Trainee, label: str) -> None:
    """Record how far each layer is from the teacher, on the first batch of the first stage."""
    if f"distance/{label}" in run.measured:
        return
    if not run.plan.converted:
        run.record(f"distance/{label}", {})
        return
    stage = run.recipe.stages[0]
    stream = run.stream(stage)
    batch = stream.collate([next(stream.sequences(stage.longest))])
    run.record(f"distance/{label}", output_distance(trainee, batch.to(run.team.device)))
