"""Sections told apart by their `kind`, each registered by its own file in a folder that is read when it is needed."""

from collections.abc import Mapping
from typing import Any, Generic, Literal, TypeVar, cast, get_args, get_origin

from pydantic_core import CoreSchema, SchemaValidator, core_schema

from ..files.discovery import import_folder
from .fields import Section

Base = TypeVar("Base", bound=Section)
Member = TypeVar("Member", bound=Section)


class Kinds(Generic[Base]):
    """The kinds of one thing, such as healing stages; `Annotated[StageBase, STAGES]` is a field that takes any of them.

    The folder is read when kinds are first asked for, so files in it may import the module that holds the registry.

    Args:
        what: what they are kinds of, in the singular.
        package: full dotted name of the package whose modules register them.
    """

    def __init__(self, what: str, package: str) -> None:
        self.what = what
        self.package = package
        self._classes: dict[str, type[Base]] = {}
        self._validators: dict[tuple[str, ...], SchemaValidator] = {}

    def register(self, section: type[Member]) -> type[Member]:
        """Class decorator that makes a section available under the one value its `kind` may have.

        Raises:
            ValueError: its `kind` is no literal with one value that is its default, or another class has that kind.
        """
        field = section.model_fields.get("kind")
        names = get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
        if field is None or len(names) != 1 or field.default != names[0]:
            raise ValueError(f'{section.__qualname__} needs its kind written as kind: Literal["name"] = "name"')
        (kind,) = names
        if kind in self._classes:
            raise ValueError(f"{self.what} {kind!r} is registered already by {self._classes[kind].__qualname__}")
        self._classes[kind] = cast(type[Base], section)
        return section

    @property
    def classes(self) -> Mapping[str, type[Base]]:
        """The class of each kind, sorted by kind."""
        import_folder(self.package)
        return dict(sorted(self._classes.items()))

    def validate(self, value: object) -> Base:
        """A section of the kind that the value names.

        Raises:
            ValidationError: there is no such kind, or a key is wrong.
        """
        classes = self.classes
        if isinstance(value, tuple(classes.values())):
            return cast(Base, value)
        names = tuple(classes)
        if names not in self._validators:
            choices = {kind: section.__pydantic_core_schema__ for kind, section in classes.items()}
            self._validators[names] = SchemaValidator(core_schema.tagged_union_schema(choices, "kind"))
        return cast(Base, self._validators[names].validate_python(value))

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> CoreSchema:
        """What lets a field annotated with this registry take all its kinds, also those registered later."""
        return core_schema.no_info_plain_validator_function(self.validate)
