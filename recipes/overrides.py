"""Overrides such as `stages.0.tokens=2e6`, applied to a recipe before it is checked."""

from collections.abc import Iterator, Sequence
from typing import Any

from .problems import Problem
from .yaml_text import parse_yaml

# Giving one of these by an override takes the place of the others that the recipe gives.
ALTERNATIVES = (("path", "hub", "embedded"), ("tokens", "steps"))
# These say more about the alternative they belong to, and go with it.
COMPANIONS = {"hub": ("name", "split"), "embedded": ("split",)}


class Overrides:
    """Changes to a recipe's plain data, with all that is wrong with them.

    Attributes:
        problems: one for each override that could not be applied.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.problems: list[Problem] = []
        self._given: set[tuple[int, str]] = set()

    def apply(self, overrides: Sequence[str]) -> None:
        """Apply overrides in order.

        Args:
            overrides: each `path=value`; the path has dots between its parts, list items by number from 0 or `*` for
                all of them; the value is YAML.
        """
        for override in overrides:
            path, equals, value = override.partition("=")
            path = path.strip()
            if not equals or not path or not all(path.split(".")):
                self.problems.append(Problem("", f"the override {override!r} has not the form path.to.key=value"))
                continue
            parsed = parse_yaml(value, f"the value of the override {override!r}")
            *parents, last = path.split(".")
            for node, walked in list(self._descend(self.data, parents, [])):
                self._assign(node, last, parsed, walked)

    def _descend(self, node: Any, parts: Sequence[str], walked: Sequence[str]) -> Iterator[tuple[Any, list[str]]]:
        """All nodes that a path leads to, each with the path that was walked; missing mappings are made."""
        if not parts:
            yield node, list(walked)
            return
        part, rest = parts[0], parts[1:]
        if isinstance(node, list):
            for number in self._numbers(node, part, walked):
                yield from self._descend(node[number], rest, [*walked, str(number)])
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            yield from self._descend(node[part], rest, [*walked, part])
        else:
            self._not_a_section(walked, part)

    def _numbers(self, items: list[Any], part: str, walked: Sequence[str]) -> range:
        """The numbers of the list items that a part of a path means."""
        if part == "*" and items:
            return range(len(items))
        if part.isdecimal() and int(part) < len(items):
            return range(int(part), int(part) + 1)
        there = f"it has items 0 to {len(items) - 1}" if items else "it is empty"
        self.problems.append(Problem(".".join([*walked, part]), f"no such item in {'.'.join(walked)}; {there}"))
        return range(0)

    def _not_a_section(self, walked: Sequence[str], part: str) -> None:
        self.problems.append(Problem(".".join([*walked, part]), f"{'.'.join(walked)} is a value and has no keys"))

    def _assign(self, node: Any, key: str, value: Any, walked: Sequence[str]) -> None:
        if isinstance(node, list):
            for number in self._numbers(node, key, walked):
                node[number] = value
        elif isinstance(node, dict):
            self._given.add((id(node), key))
            if value not in (None, False):
                self._drop_alternatives(node, key)
            node[key] = value
        else:
            self._not_a_section(walked, key)

    def _drop_alternatives(self, node: dict[str, Any], key: str) -> None:
        for group in ALTERNATIVES:
            for other in group if key in group else ():
                if other == key or other not in node or (id(node), other) in self._given:
                    continue
                del node[other]
                for companion in COMPANIONS.get(other, ()):
                    if (id(node), companion) not in self._given:
                        node.pop(companion, None)


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> list[Problem]:
    """Change a recipe's plain data in place.

    Args:
        data: the recipe as read from YAML.
        overrides: see `Overrides.apply`.

    Returns:
        what was wrong with the overrides; keys that no recipe has are left for the schema to find.
    """
    changes = Overrides(data)
    changes.apply(overrides)
    return changes.problems
