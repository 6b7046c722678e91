"""What a run measured, as rows and figures for its result, receipt and card."""

from pathlib import Path
from typing import Any

from ..distill.healing import stage_label
from ..distill.metrics import MetricsFile
from ..distill.plots import plot_layers, plot_losses
from ..distill.run import Run
from ..files.own_files import LAYER_PICTURE, LOSS_PICTURE, METRICS_FILE
from ..formats import POSITIONS


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
        by_position = run.measured.get(f"positions/{label}", {})
        figures |= {f"{POSITIONS}{stretch}": perplexity for stretch, perplexity in by_position.items()}
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


def write_figures(run: Run, folder: Path) -> None:
    """Write the lines of metrics, and pictures of losses and of the layers' distances, as far as there are any."""
    records = list(MetricsFile(run.work.metrics).records())
    if records:
        copied = MetricsFile(folder / METRICS_FILE)
        for record in records:
            copied.append(record)
        plot_losses(records, folder / LOSS_PICTURE)
    moments = [key.removeprefix("distance/") for key in run.measured if key.startswith("distance/")]
    # Nothing was measured of a model whose attention is its own.
    moments = [moment for moment in moments if run.measured[f"distance/{moment}"]]
    if moments:
        plot_layers(
            {f"after {moment}": run.measured[f"distance/{moment}"] for moment in moments}, folder / LAYER_PICTURE
        )
