"""The picture of a plan: every KV head of every layer, how much is lost without it, and which ones stay full."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .plots import label_layers, save_figure, shades_of_layers

KEPT = "#d1495b"


def plot_plan(
    losses: Sequence[Sequence[float]], full: Sequence[Sequence[bool]], path: str | Path, *, title: str, meaning: str
) -> None:
    """Draw KV heads by layer, shaded by what each loses, with a frame around those that stay full.

    Args:
        losses: by layer and KV head.
        full: likewise, whether it stays full.
        path: the PNG to write.
        title: what the plan is.
        meaning: what the shades are.

    Raises:
        OutputError: it cannot be written.
    """
    # Not through pyplot: its figures are global, and it may look for a screen.
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows = max(map(len, losses))
    grid = np.full((rows, len(losses)), np.nan)
    for layer, row in enumerate(losses):
        grid[: len(row), layer] = row
    figure = Figure(figsize=(11, min(9.0, 1.9 + 0.25 * rows)), layout="constrained")
    panel = figure.add_subplot(1, 1, 1)
    image = panel.imshow(grid, cmap=shades_of_layers(), vmin=0, aspect="auto", interpolation="nearest")
    for layer, own in enumerate(full):
        for head, is_full in enumerate(own):
            if is_full:
                corner = (layer - 0.42, head - 0.42)
                panel.add_patch(Rectangle(corner, 0.84, 0.84, fill=False, edgecolor=KEPT, linewidth=2))
    label_layers(panel, image, title=title, heads="KV head", meaning=meaning, ticks=16)
    save_figure(figure, path)
