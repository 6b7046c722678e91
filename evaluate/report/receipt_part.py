"""The exact way here: inputs, versions, recipe, command, set-up of the measurements, and how to load the result."""

from typing import Any

from ...convert.writing.card import loading
from ...convert.writing.self_contained import is_self_contained
from ...files.own_files import RECIPE_FILE
from ...formats import number, size
from ..engine.schema import Setup
from .attention_part import receipt_counts
from .blocks import Block, Cell, Listing, Section, Table, section, texts
from .gathering import Report


def receipt_section(report: Report) -> Section | None:
    """What is needed to repeat and to check everything."""
    blocks: list[Block | None] = [_receipt(report), *_setups(report)]
    if report.recipe:
        blocks.append(Listing(RECIPE_FILE, "yaml", report.recipe.strip(), collapsed=True))
    if report.receipt is not None and report.receipt.command:
        blocks.append(Listing("Command", "sh", report.receipt.command))
    if report.is_conversion and report.config:
        blocks.append(Listing("Load it", "python", _snippet(report)))
    return section("receipt", "Receipt", blocks)


def _receipt(report: Report) -> Table | None:
    found = report.receipt
    if found is None:
        return None
    rows = [
        ("base", found.repo_id or found.source),
        ("revision", found.revision or "not recorded"),
        *((f"input {name}", digest) for name, digest in found.inputs.items()),
        ("converted", found.created),
        *((f"version of {name}", value) for name, value in found.versions.items()),
        *((f"at the swap: {key.replace('_', ' ')}", number(value)) for key, value in found.start_distance.items()),
    ]
    for path, ratio in found.path_use.items():
        rows.append((f"perplexity without the {path} path over that with it", number(ratio)))
    counts = receipt_counts(report)
    if counts is not None:
        rows.append(("attention at the end of the conversion", counts.sentence))
    for label, measured in (("evaluated", report.evaluation), ("benchmarked", report.benchmark)):
        for name, digest in measured.model.digests.items() if measured is not None else ():
            rows.append((f"{label} {name}", digest))
    return Table("Inputs, outputs and versions", ("", ""), tuple(texts(*row) for row in rows if row[1]))


def _setups(report: Report) -> list[Table]:
    tables = []
    for caption, measured in (("quality", report.evaluation), ("speed", report.benchmark)):
        rows = _setup_rows(measured.setup) if measured is not None else []
        if rows:
            cells = tuple((Cell(name), Cell(value)) for name, value in rows)
            tables.append(Table(f"Set-up of the measurements of {caption}", ("", ""), cells, collapsed=True))
    if report.evaluation is not None:
        tasks = [
            (name, task.kind, ", ".join(f"{key}={value}" for key, value in task.settings.items() if key != "kind"))
            for name, task in report.evaluation.tasks.items()
        ]
        tables.append(Table("Settings of the tasks", ("task", "kind", "settings"), _cells(tasks), collapsed=True))
    if report.benchmark is not None and report.benchmark.settings is not None:
        settings = [(key, _listed(value)) for key, value in vars(report.benchmark.settings).items()]
        tables.append(Table("Settings of the benchmark", ("", ""), _cells(settings), collapsed=True))
    return tables


def _cells(rows: list[Any]) -> tuple[tuple[Cell, ...], ...]:
    return tuple(texts(*row) for row in rows)


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _setup_rows(setup: Setup) -> list[tuple[str, str]]:
    rows = []
    for key, value in setup.model_dump(exclude_unset=True).items():
        if isinstance(value, dict):
            rows += [(f"version of {name}", str(found)) for name, found in value.items()]
        elif value is not None:
            name = key.removesuffix("_bytes").replace("_", " ")
            rows.append((name, size(value) if key.endswith("_bytes") and isinstance(value, int) else str(value)))
    return rows


def _snippet(report: Report) -> str:
    architectures = report.config.get("architectures") or [""]
    model_type, flat = str(report.config.get("model_type", "")), is_self_contained(report.folder)
    return loading(report.name, model_type, str(architectures[0]), self_contained=flat)
