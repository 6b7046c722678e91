"""From a matplotlib figure to SVG whose colours are the page's, or to a PNG.

Charts are drawn in the colours of the light page. In SVG each of these becomes a CSS variable, so that one picture
serves light and dark.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#2a6f97", "#e07a2f", "#4c956c", "#9d4edd", "#c1121f")
INK, MUTED, GRID, SURFACE, IDLE = "#1b2733", "#5f6c78", "#dfe4e9", "#fdfefe", "#c3cbd3"
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    SURFACE: "--surface",
    IDLE: "--idle",
    **{color: f"--series-{number}" for number, color in enumerate(COLORS)},
}
MODEL, BASE = COLORS[0], COLORS[1]
# Inches: at 72 points each about as many pixels as a phone has beside the margins, so that text keeps its size there.
WIDTH = 4.3
SVG = "http://www.w3.org/2000/svg"
LINK = "http://www.w3.org/1999/xlink"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "attnconv",
    # Names come from files; a dollar sign in one is no formula.
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10.5,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "legend.fontsize": 10.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.linewidth": 0.9,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
}


@contextmanager
def drawing_style() -> Iterator[None]:
    """The look of all charts, for as long as they are drawn and written."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def new_figure(height: float, width: float = WIDTH) -> tuple["Figure", "Axes"]:
    """An empty chart, `height` and `width` in inches."""
    # Not through pyplot: its figures are global, and it may look for a screen.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03)
    figure = Figure(figsize=(width, height), layout=engine, facecolor="none")
    axes = figure.add_subplot(1, 1, 1)
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def to_png(figure: "Figure") -> bytes:
    """The picture as PNG on the light page's ground, without a date."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor=SURFACE, metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: "Figure", id: str, title: str, description: str) -> str:
    """The picture as an `<svg>` element for a page.

    Args:
        figure: the picture, drawn in the colours of `VARIABLES`.
        id: prefix of every id inside, unique on the page.
        title: what it is called.
        description: what it shows, for those who cannot see it.
    """
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", LINK)
    root = ElementTree.fromstring(buffer.getvalue())
    _drop(root, f"{{{SVG}}}metadata")
    _drop(root, f"{{{SVG}}}style")
    for element in root.iter():
        _adapt(element, id)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    label, text = ElementTree.Element(f"{{{SVG}}}title"), ElementTree.Element(f"{{{SVG}}}desc")
    label.text, text.text = title, description
    label.set("id", f"{id}-title")
    text.set("id", f"{id}-desc")
    root.insert(0, label)
    root.insert(1, text)
    root.set("role", "img")
    root.set("aria-labelledby", f"{id}-title {id}-desc")
    return ElementTree.tostring(root, encoding="unicode")


def _drop(root: ElementTree.Element, tag: str) -> None:
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag == tag]:
            parent.remove(child)


def _adapt(element: ElementTree.Element, prefix: str) -> None:
    """Give an element's ids a prefix and its colours the page's names; drop what the page's style says."""
    for name, value in element.attrib.items():
        if name == "id":
            element.set(name, f"{prefix}-{value}")
        elif name == f"{{{LINK}}}href" and value.startswith("#"):
            element.set(name, f"#{prefix}-{value[1:]}")
        else:
            value = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", value)
            element.set(name, _page_colors(value) if name == "style" else value)


def _page_colors(style: str) -> str:
    style = re.sub(
        r"#[0-9a-f]{6}", lambda found: f"var({VARIABLES[found[0]]})" if found[0] in VARIABLES else found[0], style
    )
    # The page's own font; only the size is the chart's.
    return re.sub(r"font: ([0-9.]+px)[^;]*", r"font-size: \1", style)
