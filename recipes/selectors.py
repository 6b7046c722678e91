"""Which layers a rule means: all of them, numbers and ranges, every n-th, the first or last few, or names by regex."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated

from pydantic import PlainValidator, WithJsonSchema

from ..errors import RecipeError

# What a list of layer numbers may be made of; any other text is a regex on module names.
NUMBERS_ONLY = re.compile(r"[\d\s,;:.+-]*")
RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")
SECONDS_PER_NAME = 1.0
FORMS = 'all, numbers such as "0-3,7", {every: 4, offset: 3}, {first: 2}, {last: 2}, or a regex on module names'


class LayerSelector(ABC):
    """A choice of layers, made without knowing the model."""

    def check(self, num_layers: int) -> None:
        """Make sure that the choice fits a model.

        Args:
            num_layers: layers of the model, at least 1.

        Raises:
            RecipeError: the choice names a layer that the model does not have.
        """
        needed = self.layers_needed
        if needed > num_layers:
            raise RecipeError(f"layers: {self} needs {needed} layers, but the model has {num_layers}, counted from 0")

    @property
    def layers_needed(self) -> int:
        """The smallest number of layers for which the choice makes sense."""
        return 0

    @abstractmethod
    def matches(self, index: int | None, num_layers: int, module_name: str) -> bool:
        """Whether a module is chosen.

        Args:
            index: the module's layer, from 0; None for a module outside of the stack of layers.
            num_layers: layers of the model.
            module_name: dotted name, such as `model.layers.0.self_attn`.
        """


@dataclass(frozen=True)
class AllLayers(LayerSelector):
    """Every attention module."""

    def matches(self, index: int | None, num_layers: int, module_name: str) -> bool:
        """True."""
        return True

    def __str__(self) -> str:
        """As a recipe writes it."""
        return "all"


@dataclass(frozen=True)
class NumberedLayers(LayerSelector):
    """Layers by number: ranges with both ends included."""

    ranges: tuple[tuple[int, int], ...]

    @property
    def layers_needed(self) -> int:
        """One more than the highest number."""
        return 1 + max(last for _, last in self.ranges)

    def matches(self, index: int | None, num_layers: int, module_name: str) -> bool:
        """Whether the number lies in a range."""
        return index is not None and any(first <= index <= last for first, last in self.ranges)

    def __str__(self) -> str:
        """As a recipe writes it."""
        return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in self.ranges)


@dataclass(frozen=True)
class EveryLayers(LayerSelector):
    """Every n-th layer, from an offset on."""

    every: int
    offset: int = 0

    @property
    def layers_needed(self) -> int:
        """At least one layer must be chosen."""
        return self.offset + 1

    def matches(self, index: int | None, num_layers: int, module_name: str) -> bool:
        """Whether the number leaves the offset as its remainder."""
        return index is not None and index % self.every == self.offset

    def __str__(self) -> str:
        """As a recipe writes it."""
        return f"{{every: {self.every}, offset: {self.offset}}}"


@dataclass(frozen=True)
class FirstLayers(LayerSelector):
    """The layers next to the input."""

    first: int

    @property
    def layers_needed(self) -> int:
        """All of them must exist."""
        return self.first

    def matches(self, index: int | None, num_layers: int, module_name: str) -> bool:
        """Whether the number is below the count."""
        return index is not None and index < self.first

    def __str__(self) -> str:
        """As a recipe writes it."""
        return f"{{first: {self.first}}}"


@dataclass(frozen=True)
class LastLayers(LayerSelector):
    """The layers next to the output."""

    last: int

    @property
    def layers_needed(self) -> int:
        """All of them must exist."""
        return self.last

    def matches(self, index: int | None, num_layers: int, module_name: str) -> bool:
        """Whether fewer layers than the count follow."""
        return index is not None and index >= num_layers - self.last

    def __str__(self) -> str:
        """As a recipe writes it."""
        return f"{{last: {self.last}}}"


@dataclass(frozen=True)
class NamedLayers(LayerSelector):
    """Modules whose dotted name holds a match of a regex."""

    pattern: re.Pattern[str]

    def matches(self, index: int | None, num_layers: int, module_name: str) -> bool:
        """Whether the regex is found anywhere in the name.

        Raises:
            RecipeError: it needs more than a second for one name, so it would backtrack for ever.
        """
        # Python's own engine cannot be stopped; this one takes the same patterns.
        import regex

        try:
            return regex.search(self.pattern.pattern, module_name, timeout=SECONDS_PER_NAME) is not None
        except TimeoutError:
            raise RecipeError(
                f"layers: the regex {self.pattern.pattern!r} finds no end on {module_name}: repeat nothing that "
                "repeats itself, as in (a+)+"
            ) from None

    def __str__(self) -> str:
        """As a recipe writes it."""
        return repr(self.pattern.pattern)


def parse_layers(value: object) -> LayerSelector:
    """Read the `layers` of a rule.

    Args:
        value: `"all"`, a number, a text such as `"0-3,7"`, a mapping with `every`, `first` or `last`, or a regex.

    Raises:
        ValueError: the value is none of these; the message says what is wrong and what is allowed.

    Examples:
        >>> parse_layers("0-3,7").matches(7, num_layers=12, module_name="model.layers.7.self_attn")
        True
        >>> parse_layers({"last": 2}).matches(7, num_layers=12, module_name="model.layers.7.self_attn")
        False
    """
    if isinstance(value, Mapping):
        return _parse_mapping(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"got {value!r}, but layers are {FORMS}")
    text = value.strip()
    if text == "all":
        return AllLayers()
    if NUMBERS_ONLY.fullmatch(text):
        return NumberedLayers(tuple(_parse_range(part.strip(), text) for part in text.split(",")))
    try:
        return NamedLayers(re.compile(text))
    except re.error as error:
        raise ValueError(f"{text!r} is no valid regex ({error}); layers are {FORMS}") from error


def _parse_range(part: str, text: str) -> tuple[int, int]:
    found = RANGE.fullmatch(part)
    if part.startswith("-"):
        raise ValueError(f"{text!r} has a negative layer; layers count from 0, and {{last: 2}} means the last two")
    if not found:
        raise ValueError(f'{text!r} is no list of layers; write numbers and ranges, such as "0-3,7"')
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise ValueError(f"{text!r} has the range {part}, which runs backwards")
    return first, last


def _parse_mapping(value: Mapping[object, object]) -> LayerSelector:
    forms = {"every": {"every", "offset"}, "first": {"first"}, "last": {"last"}}
    for key in value:
        if key not in {"every", "offset", "first", "last"}:
            near = get_close_matches(str(key), ["every", "offset", "first", "last"], n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown key {key!r}{hint} (layers are {FORMS})")
        smallest = 0 if key == "offset" else 1
        number = value[key]
        if not isinstance(number, int) or isinstance(number, bool) or number < smallest:
            raise ValueError(f"{key} must be a whole number, {smallest} or more, got {number!r}")
    chosen = [form for form in forms if form in value]
    if len(chosen) != 1 or not set(value) <= forms[chosen[0]]:
        raise ValueError(f"got {dict(value)!r}, but exactly one of {{every, offset}}, {{first}} and {{last}} is wanted")
    numbers = {str(key): int(str(number)) for key, number in value.items()}
    if chosen[0] == "every":
        if numbers.get("offset", 0) >= numbers["every"]:
            raise ValueError(f"offset must be below every, got {dict(value)!r}")
        return EveryLayers(**numbers)
    return FirstLayers(**numbers) if chosen[0] == "first" else LastLayers(**numbers)


def _checked_layers(value: object) -> object:
    parse_layers(value)
    return value


Layers = Annotated[
    str | int | dict[str, int],
    PlainValidator(_checked_layers),
    WithJsonSchema({"type": ["string", "integer", "object"]}),
]
"""A field of a recipe that chooses layers."""
