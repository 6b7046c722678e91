"""Which KV heads of its layers a rule means: by number, or those that a file says matter most."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

from .selectors import NUMBERS_ONLY, parse_layers

HEAD_FORMS = 'numbers of KV heads such as "0,3", or {importance: FILE, top: 25%}'
SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")
IMPORTANCE = "importance"
KEYS = (IMPORTANCE, "top", "measure")


@dataclass(frozen=True)
class HeadSelector:
    """Some KV heads, by number or by importance.

    Attributes:
        numbers: of the heads, the same in each layer of the rule; None where `importance` decides.
        importance: the file that says how much each head of the rule's layers matters.
        share: fraction of these heads that is taken, in (0, 1]; None where `count` says how many.
        count: how many are taken; None where `share` says what part.
        measure: which of the file's measures; None = the one that it names.
    """

    numbers: tuple[int, ...] | None = None
    importance: str | None = None
    share: float | None = None
    count: int | None = None
    measure: str | None = None

    def number(self, heads: int) -> int:
        """How many of so many heads are taken, one at least."""
        return max(1, round(self.share * heads)) if self.share is not None else self.count or 1


def parse_heads(value: object) -> HeadSelector:
    """Read the `heads` of a rule.

    Args:
        value: a number, a text such as `"0,3"` or `"0-2"`, or a mapping with `importance` and `top`.

    Raises:
        ValueError: the value is none of these; the message says what is wrong and what is allowed.
    """
    if isinstance(value, Mapping):
        return _parse_mapping(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip() or not NUMBERS_ONLY.fullmatch(value.strip()):
        raise ValueError(f"got {value!r}, but heads are {HEAD_FORMS}")
    try:
        # Numbers and ranges are written as for layers.
        ranges: Any = parse_layers(value)
    except ValueError as error:
        raise ValueError(str(error).replace("layers", "KV heads").replace("layer", "KV head")) from None
    numbers = [number for first, last in ranges.ranges for number in range(first, last + 1)]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{value!r} names a KV head twice")
    return HeadSelector(numbers=tuple(sorted(numbers)))


def _parse_mapping(value: Mapping[object, object]) -> HeadSelector:
    for key in value:
        if key not in KEYS:
            near = get_close_matches(str(key), KEYS, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown key {key!r}{hint} (heads are {HEAD_FORMS})")
    path, top, measure = value.get("importance"), value.get("top"), value.get("measure")
    if not isinstance(path, str) or not path.strip():
        raise ValueError(f"importance must name a file that `attnconv diagnose` wrote, got {path!r}")
    if measure is not None and not isinstance(measure, str):
        raise ValueError(f"measure must be the name of one, got {measure!r}")
    if isinstance(top, int) and not isinstance(top, bool) and top > 0:
        return HeadSelector(importance=path.strip(), count=top, measure=measure)
    found = SHARE.fullmatch(top.strip()) if isinstance(top, str) else None
    if found is None or not 0 < float(found[1]) <= 100:
        raise ValueError(f"top must be a share such as 25%, above 0% and up to 100%, or a number of heads, got {top!r}")
    return HeadSelector(importance=path.strip(), share=float(found[1]) / 100, measure=measure)


def _checked_heads(value: object) -> object:
    parse_heads(value)
    return value


Heads = Annotated[
    str | int | dict[str, Any],
    PlainValidator(_checked_heads),
    WithJsonSchema({"type": ["string", "integer", "object"]}),
]
"""A field of a recipe that chooses KV heads."""
