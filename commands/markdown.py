"""The README's tables of methods and recipes, as Markdown; a test compares them with what the README has."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..recipes import AttentionRule, Recipe
    from .method_list import MethodDescription

_ARXIV = "https://arxiv.org/abs/"


def methods_markdown(methods: "Iterable[MethodDescription]", recipes: "Sequence[Recipe]") -> str:
    """A row for each method: what it is, its papers, and the shipped recipes that use it.

    Args:
        methods: what to list; softmax has no row, since a layer that keeps it is not converted.
        recipes: where to look for the use of a method, and for papers beside its own.
    """
    rows = []
    for method in methods:
        if method.name == "softmax":
            continue
        users = [recipe for recipe in recipes if any(_uses(rule, method.name) for rule in recipe.attention)]
        papers = dict.fromkeys([method.paper, *(recipe.paper for recipe in users if recipe.paper)])
        names = ", ".join(f"`{recipe.name}`" for recipe in users)
        rows.append([f"`{method.name}`", method.summary, ", ".join(map(_link, papers)), names])
    return _table(["method", "what it is", "paper", "recipes"], rows)


def recipes_markdown(recipes: "Iterable[Recipe]") -> str:
    """A row for each recipe."""
    return _table(["recipe", "what it does"], [[f"`{recipe.name}`", recipe.description] for recipe in recipes])


def _uses(rule: "AttentionRule", method: str) -> bool:
    """Whether a rule makes layers of a method; one that names heads makes layers of several."""
    return rule.method == method or (rule.heads is not None and method == "by_head")


def _link(url: str) -> str:
    name = f"arXiv {url.removeprefix(_ARXIV)}" if url.startswith(_ARXIV) else url
    return f"[{name}]({url})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("|" + "|".join(line) + "|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in lines)
