"""The picture of a diagnosis: every head of every layer in heat maps."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import OutputError
from .measures import NUM_SINKS
from .profiles import Diagnosis

COLOR = "#2a6f97"
MISSING = "#eeeeee"
PANELS = (
    ("window_90", "Window of 90 % of the attention", f"newest tokens, beside the first {NUM_SINKS}", None),
    ("sink_mass", "Attention sinks", f"mass on the first {NUM_SINKS} tokens", 1.0),
    ("relative_entropy", "Entropy", "over the largest possible", 1.0),
    ("induction", "Induction", "mass on what followed last time", 1.0),
)
AHEAD = ("mass_ahead", "Attention ahead", "mass on the tokens after the query", 1.0)


def plot_diagnosis(diagnosis: Diagnosis, path: str | Path) -> None:
    """Draw how far each head looks, its sinks, its entropy and how much it copies, a panel for each.

    Args:
        diagnosis: with at least one layer.
        path: the PNG to write.

    Raises:
        OutputError: it cannot be written.
    """
    # Not through pyplot: its figures are global, and it may look for a screen.
    from matplotlib.figure import Figure

    causal = all(layer.causal for layer in diagnosis.layers)
    columns = 1 + max(layer.index for layer in diagnosis.layers)
    rows = max(len(layer.heads) for layer in diagnosis.layers)
    shades = shades_of_layers()
    figure = Figure(figsize=(11, 2 * min(4.5, max(2.2, 1.4 + 0.16 * rows))), layout="constrained")
    for place, (measure, title, meaning, top) in enumerate((*PANELS[:3], PANELS[3] if causal else AHEAD)):
        panel = figure.add_subplot(2, 2, place + 1)
        limit = float(diagnosis.context) if top is None else top
        image = panel.imshow(
            _grid(diagnosis, measure, rows, columns),
            cmap=shades,
            vmin=0,
            vmax=limit,
            aspect="auto",
            interpolation="nearest",
        )
        label_layers(panel, image, title=title, heads="head", meaning=meaning, ticks=8)
    save_figure(figure, path)


def shades_of_layers() -> Any:
    """The colours of a heat map of heads by layers, with one of its own for what is not there."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("shades", ["#ffffff", COLOR]).with_extremes(bad=MISSING)


def label_layers(panel: Any, image: Any, *, title: str, heads: str, meaning: str, ticks: int) -> None:
    """Finish a heat map of heads by layers.

    Args:
        panel: the axes that it is drawn on.
        image: what `imshow` gave.
        title: what it shows.
        heads: what its rows are.
        meaning: what the shades are.
        ticks: most numbers along an axis.
    """
    from matplotlib.ticker import MaxNLocator

    panel.set_title(title, loc="left", fontsize=11)
    panel.set_xlabel("layer")
    panel.set_ylabel(heads)
    panel.tick_params(length=0)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(ticks, integer=True))
    for spine in panel.spines.values():
        spine.set_edgecolor("#dddddd")
    bar = panel.figure.colorbar(image, ax=panel, pad=0.02, fraction=0.05)
    bar.set_label(meaning, fontsize=8)
    bar.outline.set_visible(False)


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a picture.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise OutputError(f"The picture {path} cannot be written: {error.strerror}.") from error


def _grid(diagnosis: Diagnosis, measure: str, rows: int, columns: int) -> NDArray[np.float64]:
    """`[heads, layers]`, not a number where there is no such head or it was not measured."""
    grid = np.full((rows, columns), np.nan)
    for layer in diagnosis.layers:
        for head in layer.heads:
            value = getattr(head, measure)
            grid[head.head, layer.index] = np.nan if value is None else value
    return grid
