"""Pictures of a run: the losses of its stages, and each layer's error before and after."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats import number, short
from .metrics import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#2a6f97", "#e07a2f", "#4c956c", "#9d4edd", "#c1121f")
LOSS_NAMES = {
    "attention_transfer": "attention transfer loss",
    "lora": "next-token loss (nats per token)",
    "logits": "KL(teacher || student) (nats per token)",
    "balance": "next-token, balance and z loss",
}
# Beside this many layers a mark for each would hide the line.
MARKED_LAYERS = 64


def plot_losses(records: Sequence[Record], path: Path) -> None:
    """Draw the loss of every stage over its training tokens or images, a panel for each stage.

    The scale is logarithmic where the loss spans a factor of two or more.

    Args:
        records: the lines of `metrics.jsonl`, at least one.
        path: the PNG to write.
    """
    stages = [list(lines) for _, lines in groupby(records, key=lambda record: record.index)]
    figure, panels = _figure(len(stages), 4.6, 3.4)
    for panel, lines, color in zip(panels, stages, COLORS * len(stages), strict=False):
        tokens, losses = [line.tokens for line in lines], [line.loss for line in lines]
        panel.plot(tokens, losses, color=color, linewidth=1.8, marker="o" if len(lines) == 1 else None)
        panel.set_title(f"Stage {lines[0].index + 1}: {lines[0].stage.replace('_', ' ')}", loc="left", fontsize=11)
        panel.set_xlabel(f"training {lines[0].unit}")
        panel.set_ylabel(LOSS_NAMES.get(lines[0].stage, "loss"))
        panel.xaxis.set_major_formatter(lambda value, _: short(value))
        _scale(panel, losses)
    figure.savefig(path, dpi=150)


def plot_layers(distances: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw how far each layer's attention output is from softmax attention's, a line for each moment measured.

    Args:
        distances: by moment, the relative squared error of each converted module, in the model's order; not empty.
        path: the PNG to write.
    """
    from matplotlib.ticker import MaxNLocator

    figure, (panel,) = _figure(1, 7.2, 3.8)
    for (label, layers), color in zip(distances.items(), COLORS * len(distances), strict=False):
        errors = list(layers.values())
        mark = "o" if len(errors) <= MARKED_LAYERS else None
        panel.plot(range(len(errors)), errors, color=color, linewidth=1.6, marker=mark, markersize=4, label=label)
    panel.set_yscale("log")
    panel.set_ylim(top=max(2.0, 1.3 * max(max(layers.values()) for layers in distances.values())))
    panel.axhline(1, color="#888888", linewidth=0.8, linestyle=":")
    panel.annotate(
        "as far off as an output of zeros", (0, 1), (0, 3), textcoords="offset points", fontsize=8, color="#666666"
    )
    panel.set_title("Output error of each converted attention layer", loc="left", fontsize=11)
    panel.set_xlabel("converted layer, in the model's order")
    panel.set_ylabel("squared error / squared teacher output")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend(frameon=False, loc="best")
    figure.savefig(path, dpi=150)


def _figure(panels: int, width: float, height: float) -> tuple[Any, "Sequence[Axes]"]:
    # Not through pyplot: its figures are global, and it may look for a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height), layout="constrained")
    axes = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(visible=True, which="major", color="#dddddd", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.margins(x=0.02)
    return figure, axes


def _scale(panel: "Axes", values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers on it; a linear one for values that are close together or not positive."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if min(values) <= 0 or max(values) < 2 * min(values):
        return
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 1000 * min(values) else (1,)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
