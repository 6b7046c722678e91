"""What option classes need of pydantic, without pydantic: for self-contained files, whose options were checked before.

A converted model's config.json holds every option in full, so nothing is left to convert or to compare with bounds.
"""

from collections.abc import Callable
from typing import Any

_MISSING = object()


class ValidationError(ValueError):
    """Options that the class does not know, or that are missing."""

    def errors(self) -> list[dict[str, Any]]:
        """The one problem, in pydantic's form."""
        return [{"loc": (), "msg": str(self)}]


def ConfigDict(**settings: Any) -> dict[str, Any]:  # noqa: N802
    """Settings of an option class, of which none matters here."""
    return settings


def Field(  # noqa: N802
    default: Any = _MISSING, *, default_factory: Callable[[], Any] | None = None, **bounds: Any
) -> Any:
    """The default value; bounds were checked when the model was converted."""
    return default if default_factory is None else default_factory()


def model_validator(**_: Any) -> Callable[[Any], Any]:
    """Leave a check of several options together as it is, to be called by nobody: it passed when the model was made."""
    return lambda check: check


class BaseModel:
    """Options as attributes."""

    def __init__(self, **values: Any) -> None:
        known = self._defaults()
        unknown = sorted(set(values) - set(known))
        missing = sorted(name for name, default in known.items() if default is _MISSING and name not in values)
        if unknown or missing:
            raise ValidationError(f"{type(self).__name__}: unknown {unknown}, missing {missing}")
        vars(self).update({**known, **values})

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        """Every option with its default, base classes first."""
        names = [name for owner in reversed(cls.__mro__) for name in vars(owner).get("__annotations__", ())]
        return {name: getattr(cls, name, _MISSING) for name in names if name != "model_config"}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def model_dump(self, **_: Any) -> dict[str, Any]:
        """The options as a dict."""
        return dict(vars(self))
