"""The `attnconv` section of config.json: its form, its digest, and what is wrong with one that cannot be carried out.

    version   format of the section
    modules   module name → method, options, geometry, layer_idx
    digest    of all the rest, so that a section that lost or changed anything is noticed

A damaged section must never load as fewer converted layers than were saved. Sections from before there was a digest
are read too; the tensors in the checkpoint then tell which modules must be converted (`lacks_proof`).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...attention_modules.geometry import Geometry
from ...attention_modules.registry import create, get_method
from ...errors import INSTALL, PlanError

SECTION_VERSION = 1
# Far above any model that there is, and small enough that no product of two of them overflows a size.
LARGEST_SIZE = 1 << 20
LARGEST_WIDTH = 1 << 24
"""Numbers of one token's queries or values in all heads."""
LARGEST_CORE = 1 << 31
"""Numbers in one core's parameters."""
AGAIN = "restore the file, or convert again"


class GeometrySection(BaseModel):
    """Head counts and sizes as they are saved; see `Geometry`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    num_heads: int = Field(ge=1, le=LARGEST_SIZE)
    num_kv_heads: int = Field(ge=1, le=LARGEST_SIZE)
    head_dim: int = Field(ge=1, le=LARGEST_SIZE)
    value_dim: int = Field(ge=1, le=LARGEST_SIZE)
    causal: bool = True
    hidden_size: int | None = Field(default=None, ge=1, le=LARGEST_SIZE)


class ModuleSection(BaseModel):
    """One converted module as it is saved."""

    model_config = ConfigDict(extra="forbid", strict=True)

    method: str
    options: dict[str, Any]
    geometry: dict[str, Any]
    # A module that several layers share (Zamba2) counts as -1 and is told its layer at each call.
    layer_idx: int | None = Field(ge=-1, le=LARGEST_SIZE)


def section_digest(section: Mapping[str, Any]) -> str:
    """The digest that a section carries: SHA-256 of everything else in it, whatever the order of its keys."""
    rest = {key: value for key, value in section.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]


def sealed(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section with its digest."""
    return {**section, "digest": section_digest(section)}


def lacks_proof(section: Mapping[str, Any]) -> bool:
    """Whether only the weights can tell that the section is whole: it was saved before there was a digest."""
    return "digest" not in section


def read_section(section: Any) -> list[tuple[str, ModuleSection, Geometry]]:
    """Check a section and take it apart.

    Args:
        section: what stands in config.json under `attnconv`.

    Returns:
        name, saved entry and geometry of each converted module, in order.

    Raises:
        PlanError: it is of another version or damaged, names an unknown method, or has sizes that no model has.
    """
    if not isinstance(section, Mapping):
        raise PlanError(f"the section 'attnconv' of config.json is damaged: it is {_shown(section)}; {AGAIN}")
    version = section.get("version")
    if version != SECTION_VERSION:
        if not isinstance(version, int):
            raise PlanError(f"the section 'attnconv' of config.json is damaged: it has no version; {AGAIN}")
        raise PlanError(
            f"this checkpoint was converted with section version {version!r}, but this attnconv reads "
            f"{SECTION_VERSION}; update attnconv with {INSTALL}"
        )
    modules = section.get("modules")
    if not isinstance(modules, Mapping) or not modules:
        raise PlanError(
            f"the section 'attnconv' of config.json is damaged: its modules are {_shown(modules)}, but they must name "
            f"what is converted; {AGAIN}"
        )
    found = [(str(name), *_read_module(str(name), entry)) for name, entry in modules.items()]
    if not lacks_proof(section) and section["digest"] != section_digest(section):
        raise PlanError(
            f"the section 'attnconv' of config.json is not what was saved: its digest differs, so something in it was "
            f"lost or changed; {AGAIN}"
        )
    return found


def _read_module(name: str, entry: Any) -> tuple[ModuleSection, Geometry]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("geometry"), Mapping):
        raise PlanError(f"the section 'attnconv' of config.json is damaged: {name} is {_shown(entry)}; {AGAIN}")
    try:
        parsed = ModuleSection(**entry)
        geometry = Geometry(**GeometrySection(**parsed.geometry).model_dump())
    except (TypeError, ValueError) as error:
        raise PlanError(f"the section 'attnconv' of config.json is damaged at {name}: {_problem(error)}") from error
    try:
        get_method(parsed.method)
    except ValueError as error:
        raise PlanError(f"{name}: {error}; update attnconv with {INSTALL}") from error
    _check_core(name, parsed, geometry)
    return parsed, geometry


_GOOD: set[str] = set()


def _check_core(name: str, entry: ModuleSection, geometry: Geometry) -> None:
    """Build the core without memory."""
    problem = core_problem(entry.method, entry.options, geometry)
    if problem is not None:
        raise PlanError(f"{name} cannot be built as config.json says: {problem}; {AGAIN}")


def core_problem(method: str, options: Mapping[str, Any], geometry: Geometry) -> str | None:
    """Why no attention module of these options and sizes can be built, in a clause; None if one can.

    It is built without memory. Layers mostly share one method and one geometry, so that is done once for each.

    Args:
        method: name of a registered method.
        options: its options.
        geometry: heads and sizes.
    """
    key = json.dumps([method, options, asdict(geometry)], sort_keys=True)
    if key in _GOOD:
        return None
    width = geometry.num_heads * max(geometry.head_dim, geometry.value_dim)
    if width > LARGEST_WIDTH:
        return f"a token's queries or values would be {width} numbers wide"
    numbers = [value for value in options.values() if isinstance(value, int | float)]
    if any(not -LARGEST_CORE < value < LARGEST_CORE for value in numbers):
        return f"an option is out of range: {_shown(dict(options))}"
    try:
        with torch.device("meta"):
            core = create(method, geometry, **options)
        size = sum(parameter.numel() for parameter in core.parameters())
    # Sizes that overflow are a RuntimeError of torch's.
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        return _problem(error)
    if size > LARGEST_CORE:
        return f"it would have {size:,} new parameters"
    _GOOD.add(key)
    return None


def _problem(error: Exception) -> str:
    """A foreign error in one clause."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
    return str(error).strip().split("\n")[0].rstrip(".")


def _shown(value: Any) -> str:
    """A value as a message quotes it, cut where it is long."""
    if value is None:
        return "missing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
