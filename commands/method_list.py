"""The methods and their options as plain data, which `attnconv methods` reads instead of importing torch.

`methods.json` beside this file is written by `python -m attnconv.commands.method_list`; a test compares it with the
code.
"""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

LIST_FILE = Path(__file__).with_name("methods.json")


class OptionDescription(BaseModel):
    """One option of a method.

    Attributes:
        name: its key.
        values: what it may be, in words.
        default: what it is if left out, as YAML writes it.
        meaning: what it does.
    """

    name: str
    values: str
    default: str
    meaning: str


class MethodDescription(BaseModel):
    """One method.

    Attributes:
        name: its key in a recipe.
        summary: one clause.
        paper: URL of the paper, empty for softmax itself.
        options: in the order in which the code declares them.
    """

    name: str
    summary: str
    paper: str
    options: list[OptionDescription]


_LIST = TypeAdapter(list[MethodDescription])


def read_method_list() -> list[MethodDescription]:
    """The methods as the file has them, sorted by name."""
    return _LIST.validate_json(LIST_FILE.read_text(encoding="utf-8"))


def make_method_list() -> list[MethodDescription]:
    """The methods as the code has them, sorted by name; imports torch."""
    from ..attention_modules import available, get_method

    return [
        MethodDescription(name=info.name, summary=info.summary, paper=info.paper, options=_options(info.options_class))
        for info in map(get_method, available())
    ]


def method_list_text(methods: list[MethodDescription]) -> str:
    """What the file holds."""
    return _LIST.dump_json(methods, indent=2).decode() + "\n"


def _options(options_class: type[BaseModel]) -> list[OptionDescription]:
    meanings: dict[str, str] = {}
    for base in reversed(options_class.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            meanings |= attributes_of(base)
    properties: Mapping[str, Mapping[str, Any]] = options_class.model_json_schema().get("properties", {})
    return [
        OptionDescription(
            name=name, values=_values(schema), default=_as_yaml(schema["default"]), meaning=meanings.get(name, "")
        )
        for name, schema in properties.items()
    ]


def attributes_of(described: type) -> dict[str, str]:
    """What the `Attributes:` of a class's own docstring say, by name, each in one line."""
    text = inspect.cleandoc(described.__dict__.get("__doc__") or "")
    _, _, attributes = text.partition("Attributes:\n")
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", attributes, flags=re.MULTILINE)
    return {name: " ".join(meaning.split()).removesuffix(".") for name, meaning in found}


def _values(schema: Mapping[str, Any]) -> str:
    """`relative or absolute`, `whole number from 1 on`."""
    if "anyOf" in schema:
        return " or ".join(_values(one) for one in schema["anyOf"])
    if "enum" in schema:
        *most, last = schema["enum"]
        return f"{', '.join(most)} or {last}" if most else str(last)
    kind = str(schema["type"])
    if kind == "array":
        return f"list of {_values(schema['items'])}s"
    if kind not in ("integer", "number"):
        return {"boolean": "true or false", "null": "null"}.get(kind, kind)
    words: list[str] = ["whole number" if kind == "integer" else "number"]
    limits = {"minimum": "from {}", "exclusiveMinimum": "above {}", "maximum": "to {}", "exclusiveMaximum": "below {}"}
    words += [text.format(f"{schema[key]:g}") for key, text in limits.items() if key in schema]
    return " ".join(words)


def _as_yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    LIST_FILE.write_text(method_list_text(make_method_list()), encoding="utf-8")
