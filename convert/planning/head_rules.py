"""Rules that name KV heads, worked out for a model: which rule each KV head of each layer goes by."""

from collections.abc import Sequence
from typing import Any, Protocol

from ...errors import PlanError
from .importance import HeadImportance, read_importance
from .probe import ProbedModule


class HeadChoice(Protocol):
    """What a rule says about KV heads; `recipes.heads.HeadSelector` is one."""

    @property
    def numbers(self) -> tuple[int, ...] | None:
        """Those it names; None where `importance` decides."""

    @property
    def importance(self) -> str | None:
        """The file that says how much each head matters."""

    @property
    def measure(self) -> str | None:
        """Which of its measures; None = its own choice."""

    def number(self, heads: int) -> int:
        """How many of so many heads are taken."""


class Rule(Protocol):
    """What a recipe says about layers; `recipes.AttentionRule` is one."""

    @property
    def method(self) -> str:
        """A registered method."""

    @property
    def options(self) -> dict[str, Any]:
        """Its options."""

    def matches(self, index: int, num_layers: int, module_name: str) -> bool:
        """Whether this rule takes the attention layer at `index` of `num_layers`."""


def heads_of(rule: Rule) -> HeadChoice | None:
    """The KV heads that a rule names; None if it takes all that are left."""
    selector: HeadChoice | None = getattr(rule, "head_selector", None)
    return selector


def choose_rules(
    rules: Sequence[Rule], matching: Sequence[Sequence[int]], layers: Sequence[ProbedModule]
) -> list[list[int | None]]:
    """The place of the rule that each KV head goes by; None where it keeps its softmax.

    A rule that names heads takes these, one that does not takes all that no rule before it took.

    Args:
        rules: attention rules of a recipe.
        matching: for each layer the places of the rules that match it.
        layers: the self-attention layers.

    Returns:
        for each layer, by KV head.

    Raises:
        PlanError: a rule names a head that its layers do not have, two rules name the same, or the importance that one
            refers to is about another model.
        DataError: the file of importance cannot be read.
    """
    named = {
        position: _named(position, rule, selector, [i for i, those in enumerate(matching) if position in those], layers)
        for position, rule in enumerate(rules)
        if (selector := heads_of(rule)) is not None
    }
    chosen = []
    for index, positions in enumerate(matching):
        module = layers[index]
        takers: list[int | None] = [None] * module.geometry.num_kv_heads
        for position in positions:
            wanted = named[position].get(index, ()) if position in named else range(len(takers))
            for head in wanted:
                before = takers[head]
                if position in named and before is not None and before in named:
                    raise PlanError(
                        f"attention rules {before + 1} and {position + 1} both take the KV head {head} of "
                        f"{module.name}: let each head be named once"
                    )
                takers[head] = position if before is None else before
        chosen.append(takers)
    return chosen


def resolved_options(position: int, rule: Rule, index: int, layers: Sequence[ProbedModule]) -> dict[str, Any]:
    """A rule's options for one layer, with the numbers of its own KV heads where an option says `importance`.

    Args:
        position: the rule's place in the recipe.
        rule: the rule.
        index: the layer's place.
        layers: the self-attention layers.

    Raises:
        PlanError: the importance is about another model, or more heads are wanted than there are.
        DataError: the file of importance cannot be read.
    """
    named: dict[str, HeadChoice] = getattr(rule, "head_options", {})
    found = {name: _named(position, rule, choice, [index], layers)[index] for name, choice in named.items()}
    return {**rule.options, **{name: list(heads) for name, heads in found.items()}}


def _named(
    position: int, rule: Rule, selector: HeadChoice, own: Sequence[int], layers: Sequence[ProbedModule]
) -> dict[int, tuple[int, ...]]:
    """The KV heads that a rule names in its own layers, by the number of the layer."""
    numbers = selector.numbers
    if numbers is not None:
        for index in own:
            count = layers[index].geometry.num_kv_heads
            if max(numbers) >= count:
                raise PlanError(
                    f"attention rule {position + 1} names the KV head {max(numbers)}, but {layers[index].name} has "
                    f"{count}, numbered from 0"
                )
        return dict.fromkeys(own, numbers)
    file = read_importance(selector.importance or "")
    file.check(layers, selector.importance)
    return _most_important(position, selector, file, own)


def _most_important(
    position: int, selector: HeadChoice, file: HeadImportance, own: Sequence[int]
) -> dict[int, tuple[int, ...]]:
    scores = file.scores(selector.measure, selector.importance)
    heads = sum(len(scores[index]) for index in own)
    number = selector.number(heads)
    if heads and number > heads:
        raise PlanError(
            f"attention rule {position + 1} wants the {number} most important KV heads, but its layers have {heads}"
        )
    return most_important(scores, own, number)


def most_important(scores: Sequence[Sequence[float]], layers: Sequence[int], number: int) -> dict[int, tuple[int, ...]]:
    """So many KV heads with the highest scores, of equal ones the first: their numbers, by the number of the layer.

    Args:
        scores: by layer and KV head.
        layers: numbers of the layers that count.
        number: how many heads.
    """
    heads = [(score, index, head) for index in layers for head, score in enumerate(scores[index])]
    best = sorted(heads, key=lambda item: (-item[0], item[1], item[2]))[:number]
    found: dict[int, list[int]] = {}
    for _, index, head in best:
        found.setdefault(index, []).append(head)
    return {index: tuple(sorted(numbers)) for index, numbers in found.items()}
