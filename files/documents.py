"""The ground of every file of ours that is read again: one class for writing and reading, one error for damage."""

import math
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from ..errors import CheckpointError, DataError
from .json_files import plain_json, read_json
from .output_folder import TOOL


def _finite(value: Any) -> Any:
    """What JSON writers put in place of a number that is none."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
"""A number that may be missing; NaN and infinity, which JSON does not have, are missing too."""


class Document(BaseModel):
    """A file of ours, or a part of one; what newer versions add to it is passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    def plain(self) -> dict[str, Any]:
        """Plain JSON values, as the file has them."""
        values: dict[str, Any] = plain_json(self.model_dump())
        return values


class OwnFile(Document):
    """A whole file of ours.

    Attributes:
        tool: by whom it was written
        version: of its format
    """

    NEWEST: ClassVar[int] = 1

    tool: str = TOOL
    version: int = 1


Kind = TypeVar("Kind")
FileKind = TypeVar("FileKind", bound=OwnFile)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def parse_document(kind: type[Kind], value: Any, path: Path, *, remedy: str, where: str = "") -> Kind:
    """Check what a file, or a part of one, holds.

    Args:
        kind: a `Document`, or a dataclass
        value: plain JSON values
        path: the file, for the error
        remedy: what to do about a damaged one, as an order
        where: the place in the file, for the error

    Raises:
        DataError: it is not what this package writes
    """
    try:
        return cast(Kind, _adapter(cast(Any, kind)).validate_python(value))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise DataError(f"{path} is damaged ({where}{place}: {first['msg']}): {remedy}") from None


def read_document(kind: type[FileKind], path: Path, *, remedy: str) -> FileKind | None:
    """Read a whole file of ours; None if there is none.

    Raises:
        DataError: it is damaged, of something else, or of a newer version of this package
    """
    if not path.is_file():
        return None
    try:
        value = read_json(path)
    except CheckpointError as error:
        raise DataError(f"{str(error).rstrip('.')}: {remedy}") from error
    wanted = kind.model_fields["kind"].default if "kind" in kind.model_fields else None
    if value.get("tool") != TOOL or value.get("kind") != wanted:
        raise DataError(f"{path} is no such file by {TOOL}: {remedy}")
    version = value.get("version", 0)
    if isinstance(version, int) and version > kind.NEWEST:
        raise DataError(f"{path} was written by a newer version of {TOOL}: update it, or {remedy}")
    return parse_document(kind, value, path, remedy=remedy)
