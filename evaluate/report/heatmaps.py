"""Grids whose cells are the darker the larger their numbers, and the strip of layers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...formats import number
from .drawing import COLORS, GRID, IDLE, INK, MUTED, SURFACE, WIDTH, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEVELS = 12
# Up to this many heads are drawn one by one in the strip of layers.
SINGLE_HEADS = 20
Grid = Sequence[Sequence[float | None]]


def heat_chart(
    grid: Grid,
    *,
    x: str,
    y: str,
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    top: float | None = None,
    texts: Sequence[Sequence[str]] | None = None,
    color: str = COLORS[0],
    square: bool = False,
) -> "Figure":
    """A grid of numbers from 0 to `top`; cells without a number stay empty.

    Args:
        grid: the numbers by row, the first on top.
        x: what columns are.
        y: what rows are.
        columns: names of the columns; numbers from 0 if there are none.
        rows: names of the rows.
        top: the number of the darkest cells; the largest if None.
        texts: what to print into the cells.
        color: of the darkest cells.
        square: whether a cell is as high as wide.
    """
    height, width = len(grid), max(len(row) for row in grid)
    largest = max((value for row in grid for value in row if value is not None), default=0.0)
    top = top or largest or 1.0
    inches = 0.86 * WIDTH * height / width + 0.75 if square else max(1.5, 0.26 * height + 1.0)
    figure, panel = new_figure(min(inches, 5.2))
    _cells(panel, grid, top, color)
    for row, line in enumerate(texts or ()):
        for column, text in enumerate(line):
            value = grid[row][column]
            ink = SURFACE if value is not None and value > 0.55 * top else INK
            panel.text(column, row, text, ha="center", va="center", color=ink)
    _frame(panel, width, height, columns, rows, aspect="equal" if square else "auto")
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    if texts is None:
        _key(panel, top, color)
    return figure


def strip_chart(layers: Sequence[Sequence[str]], label: str, colors: Mapping[str, str]) -> "Figure":
    """Layers from left to right, each with its heads, in the colours of their methods.

    Args:
        layers: the method of each head that is drawn, by layer.
        label: what a head is called.
        colors: of each method.
    """
    from matplotlib.patches import Patch

    rows = max(map(len, layers))
    figure, panel = new_figure(0.95 + 0.11 * max(rows, 6), WIDTH)
    for method, color in colors.items():
        grid = [[1.0 if own[row : row + 1] == (method,) else None for own in map(tuple, layers)] for row in range(rows)]
        _cells(panel, grid, 1.0, color, gap=0.14)
    _frame(panel, len(layers), rows, (), () if rows > 1 else ("",), aspect="auto")
    panel.set_xlabel("layer")
    panel.set_ylabel(label)
    handles = [Patch(color=color, label=method) for method, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(3, len(handles)), frameon=False, handlelength=1)
    return figure


def method_colors(methods: Sequence[str], unchanged: str) -> dict[str, str]:
    """A colour for each method; grey for what stays as it was."""
    changed = [method for method in methods if method != unchanged]
    colors = {method: COLORS[index % len(COLORS)] for index, method in enumerate(changed)}
    return {**colors, **({unchanged: IDLE} if unchanged in methods else {})}


def _cells(panel: "Axes", grid: Grid, top: float, color: str, gap: float = 0.0) -> None:
    """Draw the cells of each level as one shape; neighbours in a row as one rectangle where there is no gap."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    shapes: dict[int, list[tuple[int, int, int]]] = {}
    for row, line in enumerate(grid):
        for column, value in enumerate(line):
            level = 0 if value is None else round(LEVELS * min(1.0, max(0.0, value / top)))
            runs = shapes.setdefault(level, [])
            if not gap and runs and runs[-1][0] == row and runs[-1][2] == column:
                runs[-1] = (row, runs[-1][1], column + 1)
            else:
                runs.append((row, column, column + 1))
    codes = [Path.MOVETO, *[Path.LINETO] * 3, Path.CLOSEPOLY]
    for level, runs in sorted(shapes.items()):
        if level == 0:
            continue
        vertices = []
        for row, start, end in runs:
            left, right = start - 0.5 + gap / 2, end - 0.5 - gap / 2
            above, below = row - 0.5 + gap / 2, row + 0.5 - gap / 2
            vertices += [(left, above), (right, above), (right, below), (left, below), (left, above)]
        panel.add_patch(
            PathPatch(Path(vertices, codes * len(runs)), facecolor=color, edgecolor="none", alpha=level / LEVELS)
        )


def _frame(panel: "Axes", width: int, height: int, columns: Sequence[str], rows: Sequence[str], *, aspect: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    panel.set_xlim(-0.5, width - 0.5)
    panel.set_ylim(height - 0.5, -0.5)
    panel.set_aspect(aspect)  # type: ignore[arg-type]
    for axis, names, count in ((panel.xaxis, columns, width), (panel.yaxis, rows, height)):
        if names:
            axis.set_major_locator(FixedLocator(range(count)))
            axis.set_major_formatter(FuncFormatter(lambda value, _, names=names: names[round(value)]))
        else:
            axis.set_major_locator(MaxNLocator(6 if axis is panel.xaxis else 4, integer=True))
    panel.tick_params(length=0)
    for spine in panel.spines.values():
        spine.set(visible=True, edgecolor=GRID)


def _key(panel: "Axes", top: float, color: str) -> None:
    """The shades and the numbers that they stand for, above the grid."""
    from matplotlib.offsetbox import AnchoredOffsetbox, DrawingArea, HPacker, TextArea
    from matplotlib.patches import Rectangle

    shades = DrawingArea(6 * LEVELS, 7)
    for level in range(1, LEVELS + 1):
        place = (6 * (level - 1), 0)
        shades.add_artist(Rectangle(place, 6, 7, facecolor=color, edgecolor="none", alpha=level / LEVELS))
    ends = [TextArea(text, textprops={"color": MUTED}) for text in ("0", number(float(f"{top:.3g}")))]
    row = HPacker(children=[ends[0], shades, ends[1]], align="center", pad=0, sep=4)
    box = AnchoredOffsetbox(
        "lower right",
        child=row,
        frameon=False,
        pad=0.2,
        borderpad=0,
        bbox_to_anchor=(1, 1),
        bbox_transform=panel.transAxes,
    )
    panel.add_artist(box)
