"""Quality against speed: which models no other one beats in both, and a picture of that."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .charts import Axis, scale, shortened
from .drawing import BASE, IDLE, INK, MODEL, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Where a name may stand beside its point, in points, with how it is aligned; the first that hits nothing is taken.
PLACES = (
    (6, 3, "left", "bottom"),
    (-6, -3, "right", "top"),
    (6, -3, "left", "top"),
    (-6, 3, "right", "bottom"),
    (7, 0, "left", "center"),
    (-7, 0, "right", "center"),
    (6, 15, "left", "bottom"),
    (-6, -15, "right", "top"),
    (6, -15, "left", "top"),
    (-6, 15, "right", "bottom"),
    (0, 8, "center", "bottom"),
    (0, -8, "center", "top"),
    (6, 27, "left", "bottom"),
    (6, -27, "left", "top"),
)


@dataclass(frozen=True)
class Point:
    """One model.

    Attributes:
        name: its name.
        cost: seconds or bytes; less is better.
        quality: the metric.
        interval: 95 % interval of that, if there is one.
        is_base: whether it is the base.
    """

    name: str
    cost: float
    quality: float
    interval: tuple[float, float] | None = None
    is_base: bool = False


def front(points: Sequence[Point], *, better: str) -> list[Point]:
    """The points that no other one beats or equals in one thing and beats in the other, by rising cost."""
    sign = 1 if better == "lower" else -1
    kept = []
    for point in points:
        own = (point.cost, sign * point.quality)
        others = [(other.cost, sign * other.quality) for other in points]
        if not any(other != own and other[0] <= own[0] and other[1] <= own[1] for other in others):
            kept.append(point)
    return sorted(kept, key=lambda point: point.cost)


def pareto_chart(points: Sequence[Point], *, x: Axis, y: Axis, better: str) -> "Figure":
    """Each model as a point with its name; the front as steps, beyond which no model is."""
    figure, panel = new_figure(3.3)
    best = front(points, better=better)
    panel.plot(
        [point.cost for point in best],
        [point.quality for point in best],
        drawstyle="steps-post",
        # Faint, for names are written across it.
        color=IDLE,
        linewidth=1.6,
        zorder=1,
    )
    for point in points:
        color = BASE if point.is_base else MODEL
        if point.interval is not None:
            panel.plot([point.cost] * 2, point.interval, color=color, linewidth=1.4, alpha=0.6, zorder=2)
        face = color if point in best else "none"
        panel.plot([point.cost], [point.quality], "o", markersize=7, color=color, markerfacecolor=face, zorder=3)
    scale(panel, "x", x, [point.cost for point in points])
    ends = [end for point in points for end in point.interval or (point.quality,)]
    scale(panel, "y", y, ends, from_zero=False)
    panel.margins(x=0.2, y=0.16)
    panel.grid(visible=True)
    panel.tick_params(length=0)
    _name_points(figure, panel, points)
    return figure


def _name_points(figure: "Figure", panel: "Axes", points: Sequence[Point]) -> None:
    """Put each name beside its point where it covers neither another name nor a point, and stays inside."""
    figure.draw_without_rendering()
    frame = panel.get_window_extent()
    taken: list[Any] = []
    marks = [panel.transData.transform((point.cost, point.quality)) for point in points]
    for point in sorted(points, key=lambda point: -point.cost):
        best = None
        for right, up, ha, va in PLACES:
            label = panel.annotate(
                shortened(point.name, 26),
                (point.cost, point.quality),
                (right, up),
                textcoords="offset points",
                ha=ha,
                va=va,
                color=INK,
                zorder=4,
            )
            label.set_in_layout(False)
            box = label.get_window_extent()
            hits = sum(box.overlaps(other) for other in taken)
            hits += sum(bool(box.contains(*mark)) for mark in marks)
            # A name that leaves the picture is as bad as two that overlap.
            hits += 2 * (
                box.x0 < frame.x0 - 30 or box.x1 > figure.bbox.x1 or not frame.y0 <= box.y0 <= box.y1 <= frame.y1
            )
            if best is None or hits < best[0]:
                if best is not None:
                    best[1].remove()
                best = (hits, label, box)
            else:
                label.remove()
            if hits == 0:
                break
        if best is not None:
            taken.append(best[2])
