"""Everything that is wrong with a recipe in one error: each problem with its YAML path and the nearest valid key."""

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ..errors import RecipeError
from .kinds import Kinds

LONGEST_QUOTE = 60


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        path: dotted path of the key in the YAML, such as `stages.0.tokens`; empty for the recipe as a whole.
        message: what is wrong and what is allowed.
    """

    path: str
    message: str

    def __str__(self) -> str:
        """The problem on one line."""
        return f"{self.path}: {self.message}" if self.path else self.message


def recipe_error(source: str, problems: Sequence[Problem]) -> RecipeError:
    """One error for all problems of a recipe, named by where it came from."""
    if len(problems) == 1:
        return RecipeError(f"{source}: {problems[0]}")
    lines = "".join(f"\n  {problem}" for problem in problems)
    return RecipeError(f"{source} has {len(problems)} problems:{lines}")


def problems_of(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[Problem]:
    """Translate pydantic's errors.

    Args:
        error: what validating `model` raised.
        model: the class at the top.
        prefix: path of that class in the YAML.
    """
    return [_problem(dict(item), model, prefix) for item in error.errors(include_url=False)]


def nearest(key: str, valid: Sequence[str]) -> str:
    """A hint at the valid key that is most like a wrong one, or at all valid keys if none is."""
    near = get_close_matches(key, valid, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"use one of: {', '.join(valid)}" if valid else "there are no keys here"


def _problem(item: dict[str, Any], model: type[BaseModel], prefix: str) -> Problem:
    kind, context, given = item["type"], item.get("ctx", {}), item["input"]
    location = item["loc"]
    if kind == "extra_forbidden":
        path, parent = _walk(location[:-1], model)
        key = str(location[-1])
        return Problem(_join(prefix, *path, key), f"unknown key; {nearest(key, _keys(parent))}")
    path, _ = _walk(location, model)
    if kind == "union_tag_not_found":
        return Problem(_join(prefix, *path, "kind"), "this key is required")
    if kind == "union_tag_invalid":
        tags = [tag.strip("'") for tag in context["expected_tags"].split(", ")]
        known = f"the kinds are {', '.join(tags)}"
        return Problem(
            _join(prefix, *path, "kind"), f"got {_quote(context['tag'])}; {nearest(context['tag'], tags)} ({known})"
        )
    return Problem(_join(prefix, *path), _message(kind, item["msg"], context, given))


def _message(kind: str, message: str, context: dict[str, Any], given: object) -> str:
    if kind == "missing":
        return "this key is required"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        allowed = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"got {_quote(given)}; {nearest(str(given), allowed)}"
    return f"{message[0].lower()}{message[1:]}, got {_quote(given)}"


def _quote(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."


def _join(*parts: object) -> str:
    return ".".join(str(part) for part in parts if str(part))


def _walk(location: Sequence[int | str], model: type[BaseModel]) -> tuple[list[int | str], Any]:
    """Follow pydantic's location through the schema.

    Returns:
        the location without the tags of unions, which are not in the YAML, and the type it leads to.
    """
    path: list[int | str] = []
    current: Any = model
    tagged: Any = None
    for part in location:
        # Behind a tag stands a key, which may have the same name.
        members = () if tagged is not None else _members(current)
        tagged = next((member for member in members if part in _tags(member)), None)
        if tagged is not None:
            current = tagged
            continue
        path.append(part)
        current = next((found for member in _members(current) if (found := _child(member, part)) is not None), None)
    return path, current


def _members(annotation: Any) -> Iterator[Any]:
    """The alternatives of a type, without what annotates it."""
    origin = get_origin(annotation)
    kinds = [note for note in get_args(annotation)[1:] if isinstance(note, Kinds)] if origin is Annotated else []
    if kinds:
        yield from kinds[0].classes.values()
    elif origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _tags(annotation: Any) -> tuple[Any, ...]:
    if not _is_model(annotation) or "kind" not in annotation.model_fields:
        return ()
    kind = annotation.model_fields["kind"].annotation
    return get_args(kind) if get_origin(kind) is Literal else ()


def _child(annotation: Any, part: int | str) -> Any:
    if _is_model(annotation):
        field = annotation.model_fields.get(part)
        return None if field is None else field.annotation
    if isinstance(part, int) and get_origin(annotation) in (list, tuple):
        return get_args(annotation)[0]
    if get_origin(annotation) is dict:
        return get_args(annotation)[1]
    return None


def _keys(annotation: Any) -> list[str]:
    return [key for member in _members(annotation) if _is_model(member) for key in member.model_fields]
