"""Do the methods of a recipe exist, and are their options right? Asking this imports torch."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from .problems import Problem, nearest, problems_of


def method_problems(attention: object) -> list[Problem]:
    """Check the methods and options of all rules.

    Args:
        attention: the recipe's rules as plain data; whatever has not the form of a rule is passed over, for the
            schema reports it.
    """
    rules = attention if isinstance(attention, list) else []
    return [
        problem
        for number, rule in enumerate(rules)
        if isinstance(rule, Mapping) and isinstance(rule.get("method"), str)
        for problem in _rule_problems(f"attention.{number}", rule["method"].strip(), rule.get("options", {}))
    ]


def _rule_problems(path: str, method: str, options: Any) -> list[Problem]:
    from ..attention_modules import available, get_method

    if method not in available():
        return [Problem(f"{path}.method", f"unknown method {method!r}; {nearest(method, available())}")]
    if not isinstance(options, Mapping):
        return []
    options_class = get_method(method).options_class
    try:
        options_class.model_validate(dict(options))
    except ValidationError as error:
        return problems_of(error, options_class, f"{path}.options")
    return []
