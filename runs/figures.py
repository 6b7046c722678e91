"""What a run measured, as rows and figures for its result, receipt and card."""

from typing import Any

from ..distill.healing import Run, stage_label


def metric_rows(run: Run) -> tuple[dict[str, Any], ...]:
    """What was measured, one row per moment; see `ConversionResult.metrics`."""
    rows = []
    for label in (
        "teacher",
        "rewrite",
        "swap",
        *(stage_label(run.recipe, index) for index in range(len(run.recipe.stages))),
    ):
        perplexity = run.measured.get(f"perplexity/{label}", {})
        figures = {key: perplexity[key] for key in ("perplexity", "bits_per_character") if key in perplexity}
        figures |= run.measured.get(f"training/{label}", {})
        if figures:
            rows.append({"stage": label, **figures})
    return tuple(rows)


def start_distance(run: Run) -> dict[str, float]:
    """Mean and largest relative squared error of the layers right after the swap; empty if it was not measured."""
    layers = run.measured.get("distance/swap")
    if not layers:
        return {}
    return {
        "mean_relative_squared_error": sum(layers.values()) / len(layers),
        "largest_relative_squared_error": max(layers.values()),
    }
