"""What the commands print: tables that fit 80 columns on a terminal and are plain when they go to a file or pipe."""

import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..formats import POSITIONS, count, duration, number, options, percent, rate, significant, size

if TYPE_CHECKING:
    from ..attention_modules import Geometry
    from ..evaluate.diagnose.inspection import Inspection, ModuleGroup
    from ..evaluate.diagnose.rewriting import RewriteOutlook
    from ..evaluate.diagnose.stages import StageOutlook
    from ..recipes import Recipe
    from ..runs import ConversionResult
    from ..runs.demo import DemoResult

# Wide enough that no row of a table is ever broken in a file.
PLAIN_WIDTH = 1_000


def make_console(*, stderr: bool = False) -> Console:
    """A console for stdout; not on a terminal it neither colours nor breaks lines."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    # Names and paths are printed as they are, whatever brackets or colons they hold.
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=None if terminal else PLAIN_WIDTH)


def make_table(columns: Sequence[str]) -> Table:
    """An empty table; columns whose name begins with `>` are aligned to the right.

    Where a terminal is too narrow a cell goes on in the next line: none is cut, and no column is left out.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        right = name.startswith(">")
        table.add_column(name.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    return table


def command_line(*arguments: object) -> str:
    """A command of ours as it can be pasted into the shell that this process was started from."""
    program = Path(sys.argv[0])
    if program.resolve() == Path(__file__).resolve().parent.parent / "__main__.py":
        program_words = [sys.executable, "-m", "attnconv"]
    elif program.name == "attnconv" and shutil.which("attnconv") is None:
        # Run by its path, as from an environment that is not activated.
        program_words = [str(program)]
    else:
        program_words = ["attnconv"]
    return shlex.join([*program_words, *map(str, arguments)])


def show_inspection(inspection: "Inspection") -> None:
    """Modules, what becomes of each, and the memory of a sequence."""
    console = make_console()
    fate = "is" if inspection.already_converted else f"with {inspection.recipe}" if inspection.recipe else ""
    console.print(f"{inspection.source}: {inspection.class_name} ({inspection.model_type}), {inspection.dtype}")
    if inspection.rewrite is not None:
        _show_rewrite(console, inspection.rewrite)
    table = make_table(["attention", ">count", "heads", "dim", *([fate, ">new params"] if fate else [])])
    for group in inspection.groups:
        cells = [group.modules, str(group.count), *_geometry_cells(group.geometry)]
        table.add_row(*cells, *([_fate_cell(group), f"{count(group.parameters)}"] if fate else []))
    console.print(table)
    for line in _remarks(inspection):
        console.print(line)
    if inspection.footprints:
        _show_footprints(console, inspection, changed=bool(fate))
    for place, stage in enumerate(inspection.stages, 1):
        console.print(f"stage {place} ({stage.kind}): {_stage_line(stage)}")
    for line in inspection.serving:
        console.print(f"serving: {line}")


def _stage_line(stage: "StageOutlook") -> str:
    lengths = ", ".join(count(length) for length in stage.lengths)
    each = "sequences" if len(stage.lengths) == 1 else "equal shares in sequences"
    read = f"{count(stage.tokens)} tokens in {each} of {lengths}" if lengths else f"{count(stage.tokens)} images"
    return f"{read}; {count(stage.steps)} steps of {count(stage.tokens_per_step)}"


def _show_rewrite(console: Console, rewrite: "RewriteOutlook") -> None:
    if rewrite.refused is not None:
        console.print("refused: the model cannot be rewritten so, and is shown as it is")
        return
    console.print(f"rewritten: {', '.join(rewrite.steps)}")
    exact = f"not exact: {' and '.join(rewrite.inexact)}" if rewrite.inexact else "exact, which convert checks"
    sizes = ""
    if rewrite.bytes_before is not None and rewrite.bytes_after is not None:
        sizes = f", {size(rewrite.bytes_before)} become {size(rewrite.bytes_after)}"
    tensors = "" if rewrite.tensors is None else f", {count(rewrite.tensors)} tensors"
    console.print(f"the result: {rewrite.class_name}{tensors}{sizes}; its start: {exact}")
    if rewrite.teacher_bytes is not None:
        console.print(f"healing: learns from the model as it was, which takes {size(rewrite.teacher_bytes)} beside it")


def _geometry_cells(geometry: "Geometry") -> tuple[str, str]:
    heads = f"{geometry.num_heads}"
    if geometry.num_kv_heads != geometry.num_heads:
        heads += f", {geometry.num_kv_heads} kv"
    dims = f"{geometry.head_dim}"
    if geometry.value_dim != geometry.head_dim:
        dims += f", value {geometry.value_dim}"
    return heads, dims if geometry.causal else f"{dims}, both ways"


def _fate_cell(group: "ModuleGroup") -> str:
    if group.refused is not None:
        return "refused"
    if group.method is None:
        return "softmax"
    return f"{group.method}, lossy" if group.lossy else group.method


def _remarks(inspection: "Inspection") -> list[str]:
    lines: dict[str, None] = {}
    for group in inspection.groups:
        if group.refused is not None:
            lines[f"refused: {group.modules}: {group.refused}; keep it softmax in the recipe"] = None
        elif group.method is not None:
            lines[f"{group.method}: {options(group.options)}"] = None
            if group.lossy:
                lines[f"lossy: leaves out {' and '.join(group.lossy)}; convert needs --allow-lossy"] = None
    if inspection.already_converted:
        lines["This model is converted already; the rows show what it is now."] = None
    elif inspection.recipe is None:
        lines["Add --recipe NAME to see what a recipe would do; `attnconv recipes list` names them."] = None
    elif inspection.rewrite is None or inspection.num_converted:
        counts = f"{inspection.num_converted} of {inspection.num_modules} modules would be converted"
        lines[f"{counts}, {count(inspection.parameters)} new parameters."] = None
    return list(lines)


def _show_footprints(console: Console, inspection: "Inspection", *, changed: bool) -> None:
    table = make_table([">tokens", ">KV cache", *([">converted", ">share"] if changed else [])])
    for row in inspection.footprints:
        share = percent(row.after / row.before if row.before else None)
        cells = [count(row.tokens), size(row.before)]
        table.add_row(*cells, *([size(row.after), share] if changed else []))
    console.print(f"\nself-attention memory of one sequence while generating, in {inspection.dtype}:")
    console.print(table)


def show_recipes(recipes: Iterable["Recipe"]) -> None:
    """Name and description of each recipe."""
    console = make_console()
    table = make_table(["recipe", "what it does"])
    for recipe in recipes:
        table.add_row(recipe.name, recipe.description)
    console.print(table)


def show_conversion(result: "ConversionResult", *, base: str) -> None:
    """What was measured, where the result is, and how to see what it is worth beside its base."""
    console = make_console()
    if result.metrics:
        console.print(_metrics_table(result.metrics))
        console.print()
    if result.exactness is not None:
        console.print(f"The start: {result.exactness.sentence}.")
    if result.plan.is_native:
        console.print(f"Done in {duration(result.seconds)}: {', '.join(result.plan.rewrites)}.")
        console.print(f"The model is in {result.output}: an ordinary one, which transformers loads by itself.")
        console.print(f"Next: {command_line('eval', result.output, '--against', base)}", soft_wrap=True)
        return
    counts = Counter(entry.method for entry in result.plan.converted)
    what = ", ".join(
        f"{count} of {len(result.plan.entries)} attention modules to {name}" for name, count in counts.items()
    )
    console.print(f"Converted {what} in {duration(result.seconds)}.")
    if result.self_contained:
        console.print(
            f"The model is in {result.output}: from_pretrained with trust_remote_code=True, without attnconv."
        )
    else:
        console.print(f"The model is in {result.output}: import attnconv, then from_pretrained as ever.")
    if result.linked:
        console.print(
            "Its weights are linked to the base's, which takes no room; overwriting those in place changes both."
        )
    console.print(f"Next: {command_line('eval', result.output, '--against', base)}", soft_wrap=True)


def _metrics_table(metrics: Iterable[Mapping[str, Any]]) -> Table:
    """A row for each moment; a column for each figure that any of them has."""
    rows = list(metrics)
    formats: dict[str, Callable[[float], str]] = {
        "perplexity": number,
        "bits_per_character": significant,
        "loss": number,
    }
    # What moves beside a bar is the loss of one step; this is the mean since the line of metrics before.
    names = {"bits_per_character": "bits/char", "loss": "mean loss"}
    for unit in ("tokens", "images"):
        formats |= {unit: count, f"{unit}_per_second": rate}
        names |= {unit: f"trained {unit}", f"{unit}_per_second": f"{unit}/s"}
    stretches = dict.fromkeys(key for row in rows for key in row if key.startswith(POSITIONS))
    formats |= dict.fromkeys(stretches, number)
    names |= {key: f"novel at {key.removeprefix(POSITIONS)}" for key in stretches}
    present = [key for key in formats if any(key in row for row in rows)]
    table = make_table(["after", *(f">{names.get(key, key)}" for key in present)])
    for row in rows:
        table.add_row(row["stage"], *(formats[key](row[key]) if key in row else "" for key in present))
    return table


def show_demo(result: "DemoResult") -> None:
    """Perplexities, both continuations, and what to try next."""
    console = make_console()
    methods = ", ".join(result.methods)
    console.print(f"{result.layers} of {result.num_layers} attention layers converted to {methods}.\n")
    console.print(_metrics_table(result.metrics))
    for name, answer in (("Teacher", result.teacher), ("Converted", result.converted)):
        kind = "key/value cache" if not answer.recurrent_layers else f"{answer.recurrent_layers} recurrent states"
        held = f", {size(answer.cache_bytes)} in its {kind} at the end:"
        console.print(Text.assemble("\n", (name, "bold"), held))
        console.print(answer.text)
    console.print(f"\nAll of it took {duration(result.seconds)}. The model is in {result.output}. Try next:")
    for command in (
        f"inspect {shlex.quote(str(result.output))}",
        "inspect HuggingFaceTB/SmolLM2-135M --recipe lolcats",
        "recipes copy lolcats my-recipe.yaml",
        "convert HuggingFaceTB/SmolLM2-135M --recipe my-recipe.yaml --output smollm2-linear",
    ):
        console.print(f"  {command_line(*shlex.split(command))}", soft_wrap=True)
