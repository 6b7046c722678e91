"""Everything that a folder says about a conversion, read once and checked."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...attention_modules import create
from ...convert.planning.plan import Plan, PlanEntry
from ...convert.reading.checkpoint import open_checkpoint
from ...convert.writing.receipt import Receipt, digest_inputs, read_receipt
from ...distill.metrics import MetricsFile, Record
from ...errors import CheckpointError, DataError, PlanError
from ...files.containment import inside
from ...files.documents import parse_document
from ...files.json_files import read_json
from ...files.output_folder import is_ours
from ...files.own_files import CARD_FILE, CONFIG_FILE, METRICS_FILE, RECEIPT_FILE, RECIPE_FILE, SECTION
from ...files.whole_files import refuse_link
from ..bench.schema import BenchmarkFile
from ..engine.results import FOLDER, read_results, results_path
from ..engine.schema import EvaluationFile, ResultsFile, TaskResult
from ..tasks.fidelity import FidelityExtra

logger = logging.getLogger(__name__)

UNCHANGED = "unchanged"


@dataclass(frozen=True)
class ConvertedModule:
    """One converted attention module.

    Attributes:
        entry: what the plan says of it.
        parameters: its new parameters.
    """

    entry: PlanEntry
    parameters: int


@dataclass(frozen=True)
class Report:
    """What is known about a conversion, or about another model that was measured.

    Attributes:
        folder: the conversion's folder, or the folder of results.
        results: where measurements are, and the report goes.
        name: what to call it.
        base: what to call its base; empty if nothing says.
        config: the model's configuration; empty for a model that was only measured.
        modules: the converted modules, in the model's order.
        receipt: how it was made.
        recipe: the recipe as it was run.
        records: what healing reported as it went.
        evaluation: quality.
        fidelity: maps and statistics of the fidelity tasks, by task.
        benchmark: speed and memory.
    """

    folder: Path
    results: Path
    name: str
    base: str
    config: dict[str, Any]
    modules: tuple[ConvertedModule, ...]
    receipt: Receipt | None
    recipe: str
    records: tuple[Record, ...]
    evaluation: EvaluationFile | None
    fidelity: dict[str, list[FidelityExtra]]
    benchmark: BenchmarkFile | None

    @property
    def is_conversion(self) -> bool:
        """Whether the folder is that of a converted model."""
        return self.folder != self.results

    @property
    def parameters(self) -> int:
        """New parameters in all."""
        return sum(module.parameters for module in self.modules)

    @property
    def methods(self) -> dict[str, list[ConvertedModule]]:
        """The converted modules of each method, in order of first appearance."""
        found: dict[str, list[ConvertedModule]] = {}
        for module in self.modules:
            found.setdefault(module.entry.method, []).append(module)
        return found

    @property
    def num_layers(self) -> int | None:
        """Layers of the model, if its configuration says."""
        text = self.config.get("text_config") or self.config
        layers = text.get("num_hidden_layers")
        return layers if isinstance(layers, int) else None

    @property
    def num_heads(self) -> int | None:
        """Query heads of a layer, if the configuration says."""
        text = self.config.get("text_config") or self.config
        heads = text.get("num_attention_heads")
        return heads if isinstance(heads, int) else None

    def tasks(self, *kinds: str) -> dict[str, TaskResult]:
        """The evaluated tasks of some kinds; all without one."""
        tasks = self.evaluation.tasks if self.evaluation else {}
        return {name: task for name, task in tasks.items() if not kinds or task.kind in kinds}


def gather(folder: Path) -> Report:
    """Read a conversion's folder with its results, or a folder with results of any other model.

    Raises:
        DataError: there is nothing to report on, or a file is damaged.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}: give the output of `attnconv convert`.")
    ours = is_ours(folder)
    results = refuse_link(folder / FOLDER) if ours else folder
    if ours:
        _refuse_links_out(folder)
    evaluation, benchmark = read_results(results, EvaluationFile), read_results(results, BenchmarkFile)
    if not ours and evaluation is None and benchmark is None:
        raise DataError(
            f"{folder} holds neither a conversion nor measurements: give the output of `attnconv convert`, "
            "or a folder with eval.json or bench.json."
        )
    if ours:
        _warn_of_other_weights(folder, evaluation, benchmark)
    config = _json(folder / CONFIG_FILE) if ours else {}
    receipt = read_receipt(folder) if ours else None
    measured = evaluation or benchmark
    base = _base_name(receipt, measured)
    name = folder.resolve().name
    return Report(
        folder=folder,
        results=results,
        name=measured.model.name or name if measured is not None and not ours else name,
        base=base,
        config=config,
        modules=_modules(config, receipt, folder) if ours else (),
        receipt=receipt,
        recipe=_recipe(folder / RECIPE_FILE) if ours else "",
        records=tuple(MetricsFile(folder / METRICS_FILE).records()) if ours else (),
        evaluation=evaluation,
        fidelity=_fidelity(evaluation, results_path(results, EvaluationFile)),
        benchmark=benchmark,
    )


def _refuse_links_out(folder: Path) -> None:
    """Insist that what is read into the report, and published with it, lies in the folder."""
    beside = (results_path(Path(FOLDER), kind).as_posix() for kind in (EvaluationFile, BenchmarkFile))
    for name in (CONFIG_FILE, RECEIPT_FILE, RECIPE_FILE, METRICS_FILE, CARD_FILE, *beside):
        if (folder / name).is_symlink():
            try:
                inside(folder.resolve(), name)
            except CheckpointError as error:
                raise DataError(str(error)) from error


def _warn_of_other_weights(folder: Path, *measurements: ResultsFile | None) -> None:
    """Say which measurements are not of the weights that are in the folder now."""
    try:
        now = sorted(digest_inputs(open_checkpoint(folder, allow_converted=True)).values())
    except (CheckpointError, PlanError, OSError):
        # Without its weights, as after a partial download, it can be reported on; a damaged section is named later.
        return
    for found in measurements:
        if found is not None and sorted(found.model.digests.values()) != now:
            logger.warning("%s.json in %s is of other weights than those there now: measure again.", found.kind, folder)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except CheckpointError as error:
        raise DataError(f"{error} It belongs to the conversion: make that again.") from error


def _recipe(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def _base_name(receipt: Receipt | None, measured: EvaluationFile | BenchmarkFile | None) -> str:
    """The base as people call it: a Hub id, or the last part of a path."""
    if receipt is not None and (receipt.repo_id or receipt.source):
        return receipt.repo_id or Path(receipt.source).name
    return measured.base.name if measured is not None and measured.base is not None else ""


def _modules(config: dict[str, Any], receipt: Receipt | None, folder: Path) -> tuple[ConvertedModule, ...]:
    """The converted modules, from the configuration or, where that is a native model's, from the receipt."""
    in_config = SECTION in config
    section = config.get(SECTION) or (receipt.plan if receipt else None)
    if not section:
        return ()
    path = folder / (CONFIG_FILE if in_config else RECEIPT_FILE)
    try:
        entries = Plan.from_config(section).entries
        with torch.device("meta"):
            cores = [create(entry.method, entry.geometry, **entry.options) for entry in entries]
    except PlanError as error:
        raise DataError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged: its plan cannot be read ({error}); convert again.") from error
    return tuple(
        ConvertedModule(entry, sum(tensor.numel() for tensor in core.parameters()))
        for entry, core in zip(entries, cores, strict=True)
    )


def _fidelity(evaluation: EvaluationFile | None, path: Path) -> dict[str, list[FidelityExtra]]:
    tasks = evaluation.tasks if evaluation else {}
    return {
        name: [
            parse_document(FidelityExtra, extra, path, where=f"{name}: ", remedy="remove it and measure again")
            for extra in task.extras.get("model", [])
        ]
        for name, task in tasks.items()
        if task.kind == "fidelity"
    }
