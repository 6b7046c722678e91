"""What the measuring commands print."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .cli_views import make_console, make_table

if TYPE_CHECKING:
    from .evaluate.engine import Evaluation

# A task with more groups than this shows its overall figures only; the file and the report have all.
MOST_GROUPS = 6


def show_evaluation(evaluation: "Evaluation") -> None:
    """Figures of each task, with intervals, and where all the rest is."""
    console = make_console()
    document = evaluation.document
    tasks = {name: document["tasks"][name] for name in evaluation.ran}
    two = any(figure["base"] is not None for task in tasks.values() for figure in task["figures"])
    table = make_table(["task", "figure", *([">base"] if two else []), ">model", *([">change"] if two else []), "95 %"])
    for name, task in tasks.items():
        for figure in _shown(task["figures"]):
            table.add_row(name, *_cells(figure, two))
            name = ""
    console.print(table)
    console.print(f"\nmodel: {_named(document['model'])}")
    if two:
        console.print(f"base:  {_named(document['base'])}")
    for name, reason in evaluation.skipped.items():
        console.print(f"left out: {name}: {reason}")
    if two and not all(figure["paired"] for figure in _compared(tasks)):
        console.print("The models cut text into different tokens: compare bits/char, not perplexity.")
    console.print(f"All figures and scores are in {evaluation.path}.")
    if document["model"]["converted"] and evaluation.path.parent.name == "results":
        console.print(f"Next: attnconv report {evaluation.path.parent.parent}", soft_wrap=True)


def format_value(value: float | None, style: str) -> str:
    """A figure as tables print it."""
    if value is None:
        return "-"
    if style == "percent":
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def format_change(value: float | None, figure: Mapping[str, Any]) -> str:
    """A change as tables print it: a factor, or a difference with its sign."""
    if value is None:
        return "-"
    if figure["compare"] == "ratio":
        return f"{value:.3f} x"
    return f"{100 * value:+.1f}" if figure["style"] == "percent" else f"{value:+.4f}"


def _shown(figures: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    by_keys: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for figure in figures:
        by_keys.setdefault(tuple(figure["group"]), []).append(figure)
    for keys, members in by_keys.items():
        if not keys or len({str(member["group"]) for member in members}) <= MOST_GROUPS:
            yield from members


def _cells(figure: Mapping[str, Any], two: bool) -> list[str]:
    label = ", ".join([figure["metric"], *(f"{key} {value}" for key, value in figure["group"].items())])
    own = format_value(figure["model"], figure["style"])
    interval = figure["interval"]
    if not two:
        return [label, own, _interval([format_value(end, figure["style"]) for end in interval or ()])]
    if figure["base"] is None:
        return [label, "", own, "", _interval([format_value(end, figure["style"]) for end in interval or ()])]
    ends = [format_change(end, figure) for end in figure["change_interval"] or ()]
    return [
        label,
        format_value(figure["base"], figure["style"]),
        own,
        format_change(figure["change"], figure),
        _interval(ends),
    ]


def _interval(ends: list[str]) -> str:
    return f"{ends[0]} to {ends[1]}" if ends else ""


def _named(model: Mapping[str, Any]) -> str:
    return f"{model['source']}, {model['dtype']}{', converted' if model['converted'] else ''}"


def _compared(tasks: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for task in tasks.values():
        if task["kind"] == "perplexity":
            yield from (figure for figure in task["figures"] if figure["base"] is not None)
