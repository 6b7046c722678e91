"""Field types and the base class that all sections of a recipe share."""

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, and what was read stays as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def compact(self) -> dict[str, Any]:
        """Everything as plain data, without the keys that are empty and would be empty if left out."""
        return {
            name: _plain(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if getattr(self, name) is not None or field.default is not None
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.compact()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def whole_number(value: object) -> object:
    """Turn `2e6`, `2e6` as text and `20_000_000` as text into whole numbers; leave the rest to pydantic."""
    if isinstance(value, bool):
        raise ValueError(f"a whole number is wanted, got {value!r}")
    if isinstance(value, str):
        try:
            value = float(value.replace("_", "")) if not value.strip().isdecimal() else int(value)
        except ValueError:
            raise ValueError(f"a whole number is wanted, such as 512, 2e6 or 20_000_000, got {value!r}") from None
    if isinstance(value, float):
        if not math.isfinite(value) or value != int(value):
            raise ValueError(f"a whole number is wanted, got {value!r}")
        return int(value)
    return value


# What JSON and every counter underneath can hold exactly.
LARGEST_COUNT = 2**53
Count = Annotated[int, BeforeValidator(whole_number), Field(ge=1, le=LARGEST_COUNT)]
CountOrZero = Annotated[int, BeforeValidator(whole_number), Field(ge=0, le=LARGEST_COUNT)]


def rising(ends: list[int]) -> list[int]:
    """Check positions at which buckets of a context end.

    Raises:
        ValueError: they do not rise
    """
    if sorted(set(ends)) != ends:
        raise ValueError(f"positions where buckets end must rise, such as [512, 2048], got {ends}")
    return ends


def sequence_lengths(value: object) -> object:
    """Check the length of a stage's sequences, or a list of lengths.

    Raises:
        ValueError: one is no whole number of at least 2, or there is none
    """
    if not isinstance(value, list):
        return _sequence_length(value)
    if not value:
        raise ValueError("got an empty list; give one length such as 1024, or several such as [512, 1024, 4096]")
    return [_sequence_length(length) for length in value]


def _sequence_length(value: object) -> int:
    number = whole_number(value)
    if not isinstance(number, int) or not 2 <= number <= LARGEST_COUNT:
        raise ValueError(f"a whole number of at least 2 is wanted, got {value!r}")
    return number


Lengths = Annotated[int | list[int], BeforeValidator(sequence_lengths)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]


def exactly_one(given: dict[str, bool]) -> None:
    """Check that one of some alternatives was chosen.

    Args:
        given: each alternative's key and whether it was given.

    Raises:
        ValueError: none was given, or more than one.
    """
    chosen = [key for key, present in given.items() if present]
    if len(chosen) != 1:
        got = " and ".join(chosen) or "none of them"
        raise ValueError(f"exactly one of {', '.join(given)} is wanted, got {got}")
