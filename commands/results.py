"""What the measuring commands print."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from ..attention_modules.counts import AttentionCounts
from ..formats import amount, change, count, counted, number, percent, ratio, size
from .tables import command_line, make_console, make_table

if TYPE_CHECKING:
    from ..convert.planning.importance import HeadImportance
    from ..evaluate.bench import BenchResult
    from ..evaluate.bench.cases import Case
    from ..evaluate.bench.rows import BenchRow
    from ..evaluate.diagnose import Diagnosis, LayerAdvice
    from ..evaluate.engine.items import Figure
    from ..evaluate.engine.running import Evaluation
    from ..evaluate.engine.schema import MeasuredModel, TaskResult
    from ..evaluate.report import ConversionComparison, ReportFiles
    from ..runs.data_scores import DataScores
    from ..runs.planner import ModelPlan

# A task with more groups than this shows its overall figures only; the file and the report have all.
MOST_GROUPS = 6


def show_evaluation(evaluation: "Evaluation") -> None:
    """Figures of each task, with intervals, and where all the rest is."""
    console = make_console()
    results = evaluation.results
    tasks = {name: results.tasks[name] for name in evaluation.ran}
    two = any(figure.base is not None for task in tasks.values() for figure in task.figures)
    table = make_table(["task", "figure", *([">base"] if two else []), ">model", *([">change"] if two else []), "95 %"])
    for name, task in tasks.items():
        for figure in _shown(task.figures):
            table.add_row(name, *_cells(figure, two))
            name = ""
    console.print(table)
    console.print(f"\nmodel: {_named(results.model)}")
    if results.base is not None and two:
        console.print(f"base:  {_named(results.base)}")
    for role, found in results.attention.items():
        whose = "attention" if role == "model" else "attention of the base"
        console.print(f"{whose}: {AttentionCounts.from_dict(found).sentence}")
    for name, reason in evaluation.skipped.items():
        console.print(f"left out: {name}: {reason}")
    if words := ", ".join(_wins(tasks)):
        console.print(f"as good as the base or better, of the same questions: {words}")
    if two and not all(figure.paired for figure in _compared(tasks)):
        console.print("The models cut text into different tokens: compare bits/char, not perplexity.")
    for remark in results.remarks:
        console.print(remark.replace("`", ""))
    console.print(f"All figures and scores are in {evaluation.path}.")
    if results.model.converted and evaluation.path.parent.name == "results":
        console.print(f"Next: {command_line('report', evaluation.path.parent.parent)}", soft_wrap=True)


def _wins(tasks: "Mapping[str, TaskResult]") -> "Iterator[str]":
    """Of each task with one, its first metric's share of items that the model wins or ties."""
    for name, task in tasks.items():
        overall = (f for f in task.figures if not f.group and f.at_least_as_good is not None and f.style == "percent")
        for figure in list(overall)[:1]:
            yield f"{name} {percent(figure.at_least_as_good)}"


def _shown(figures: "Sequence[Figure]") -> "Iterator[Figure]":
    by_keys: dict[tuple[str, ...], list[Figure]] = {}
    for figure in figures:
        by_keys.setdefault(tuple(figure.group), []).append(figure)
    for keys, members in by_keys.items():
        if not keys or len({str(member.group) for member in members}) <= MOST_GROUPS:
            yield from members


def _cells(figure: "Figure", two: bool) -> list[str]:
    label = ", ".join([figure.metric, *(f"{key} {value}" for key, value in figure.group.items())])
    own = amount(figure.model, figure.style)
    interval = figure.interval
    if not two:
        return [label, own, _interval([amount(end, figure.style) for end in interval or ()])]
    if figure.base is None:
        return [label, "", own, "", _interval([amount(end, figure.style) for end in interval or ()])]
    ends = [_change(end, figure) for end in figure.change_interval or ()]
    return [
        label,
        amount(figure.base, figure.style),
        own,
        _change(figure.change, figure),
        _interval(ends),
    ]


def _change(value: float | None, figure: "Figure") -> str:
    # The column is of one figure, so its unit need not be said at each end.
    return change(value, figure.compare, figure.style).removesuffix(" points")


def _interval(ends: list[str]) -> str:
    return f"{ends[0]} to {ends[1]}" if ends else ""


def _named(model: "MeasuredModel") -> str:
    return f"{model.source}, {model.dtype}{', converted' if model.converted else ''}"


def _compared(tasks: "Mapping[str, TaskResult]") -> "Iterator[Figure]":
    for task in tasks.values():
        if task.kind == "perplexity":
            yield from (figure for figure in task.figures if figure.base is not None)


def show_bench(result: "BenchResult") -> None:
    """Medians with quartiles, side by side, what the caches hold, and where the model overtakes its base."""
    from ..evaluate.bench import bench_rows, crossover_sentences, setup_sentence
    from ..evaluate.bench.rows import attention_of

    console = make_console()
    rows = bench_rows(result.results)
    two = any(row.base is not None for row in rows)
    # Time and memory each in a table of their own: both together are wider than a terminal.
    console.print(
        _bench_table(rows, [*([">base"] if two else []), ">model", *([">speed-up"] if two else [])], _times_of)
    )
    console.print()
    names = ["cache", "peak memory"]
    columns = [f">{side}'s {name}" for name in names for side in ("base", "model")] if two else [f">{n}" for n in names]
    # A decoding step has the cache of the prompt before it.
    console.print(_bench_table([row for row in rows if row.measure != "decode"], columns, _memory_of))
    console.print()
    for sentence in crossover_sentences(result.results.crossover):
        console.print(sentence)
    for measure, counts in attention_of(rows).items():
        console.print(f"attention, {measure}: {counts.sentence}")
    for row in rows:
        for role, case in (("base", row.base), ("model", row.model)):
            if case is not None and case.skipped:
                size = f"{count(row.context)} tokens, batch {row.batch}"
                console.print(f"left out: {row.measure} of the {role}, {size}: {case.skipped}")
    console.print(setup_sentence(result.results))
    console.print(f"All figures are in {result.path}.")


def _bench_table(
    rows: "Sequence[BenchRow]", columns: Sequence[str], cells: "Callable[[BenchRow, bool], list[str]]"
) -> Table:
    """A line for each measure at one length and batch size."""
    two = any(row.base is not None for row in rows)
    batches = any(row.batch != 1 for row in rows)
    table = make_table(["", ">tokens", *([">batch"] if batches else []), *columns])
    for row in rows:
        size = [count(row.context), *([count(row.batch)] if batches else [])]
        table.add_row(row.measure, *size, *cells(row, two))
    return table


def _times_of(row: "BenchRow", two: bool) -> list[str]:
    own = _time(row.model)
    return [_time(row.base), own, _times(row.speedup)] if two else [own]


def _memory_of(row: "BenchRow", two: bool) -> list[str]:
    cases = [row.base, row.model] if two else [row.model]
    held = [_bytes(None if case is None else case.cache_bytes) for case in cases]
    return held + [_bytes(None if case is None else case.peak_bytes) for case in cases]


def _time(case: "Case | None") -> str:
    """`40 ms [38-45]`; per token for decoding."""
    if case is None or case.median is None or case.low is None or case.high is None:
        return "-"
    unit, factor = ("ms", 1e3) if case.measure == "decode" or case.median < 1 else ("s", 1.0)
    middle, low, high = (amount(factor * value, "number") for value in (case.median, case.low, case.high))
    return f"{middle} {unit} [{low}-{high}]"


def _times(value: float | None) -> str:
    return "" if value is None else ratio(value, 3)


def _bytes(value: int | None) -> str:
    return "" if value is None else size(value)


def show_diagnosis(diagnosis: "Diagnosis", advice: "Sequence[LayerAdvice]") -> None:
    """What each layer's heads look at, and what the layer could become."""
    from ..evaluate.diagnose.roles import MEANINGS

    console = make_console()
    advised = {one.layer: one for one in advice}
    table = make_table(
        ["layer", "heads", ">span", ">90 % within", ">entropy", ">first tokens", ">induction", "advice", ">window"]
    )
    for layer in diagnosis.layers:
        roles = ", ".join(f"{heads} {role}" for role, heads in layer.role_counts.items() if heads)
        widest = max(head.window_90 for head in layer.heads)
        induction = [head.induction for head in layer.heads if head.induction is not None]
        figures = [count(layer.mean("mean_distance")), count(widest), f"{layer.mean('entropy'):.2f}"]
        figures += [percent(layer.mean("sink_mass"), 0), percent(max(induction, default=None), 0)]
        one = advised.get(layer.index)
        window = None if one is None else one.options.get("window")
        table.add_row(
            str(layer.index), roles, *figures, "" if one is None else one.method, "" if window is None else str(window)
        )
    # Where the terminal is narrow, the roles give way: a method's name can be copied as it stands.
    table.columns[-2].no_wrap = True
    console.print(table)
    texts = f"{count(diagnosis.tokens)} tokens of {diagnosis.text} in windows of {count(diagnosis.context)}"
    console.print(f"\n{texts}. Means over heads, except the widest 90 % window and the best induction head.")
    for role, heads in diagnosis.role_counts.items():
        if heads:
            console.print(f"{role}: {heads} heads; {MEANINGS[role]}")
    console.print("\nWhy:")
    for one in advice:
        console.print(f"  {one.layer}: {one.method}: {one.reason}")


def show_importance(importance: "HeadImportance", path: "Path | None") -> None:
    """The KV heads that matter most by a file's own measure, and where the file is."""
    console = make_console()
    scores = importance.scores(None)
    heads = [(score, layer, head) for layer, row in enumerate(scores) for head, score in enumerate(row)]
    best = ", ".join(f"{layer}.{head} ({number(score)})" for score, layer, head in sorted(heads, reverse=True)[:10])
    console.print(f"\nKV heads that matter most by {importance.measure}, as layer.head: {best}.")
    console.print(f"All {len(heads)}, by {', '.join(importance.measures)}, are in {path}.")


def show_plan(plan: "ModelPlan") -> None:
    """Which KV heads stay full, what each was judged to need, and what the whole costs and loses."""
    console = make_console()
    table = make_table(["layer", "full heads", "streaming heads"])
    for layer, (losses, full) in enumerate(zip(plan.losses, plan.full, strict=True)):
        cells = [
            ", ".join(f"{head} ({number(losses[head])})" for head, own in enumerate(full) if own is wanted)
            for wanted in (True, False)
        ]
        table.add_row(str(layer), *cells)
    console.print(table)
    settings = plan.settings
    what = "the share of full attention it learned to need" if settings.measure == "trained" else "nats lost without it"
    console.print(f"\nIn brackets, of each KV head: {what}.")
    kind, length = settings.budget.kind, count(settings.length)
    console.print(
        f"{plan.kept} of {plan.heads} KV heads stay full: {percent(plan.cost)} of its {kind} at {length} tokens."
    )
    console.print(f"Predicted: {percent(plan.predicted)} of the sum in brackets is lost.")
    console.print(
        f"On a text that decided nothing it is {number(plan.hidden)} nats from the model where something hidden is "
        f"asked for, and {number(plan.ordinary)} elsewhere."
    )


def show_data_scores(scores: "DataScores", path: "Path") -> None:
    """Which heads were masked, what that does to the loss, and what was kept."""
    console = make_console()
    heads = ", ".join(f"{layer}.{head}" for layer, own in sorted(scores.heads.items()) for head in own)
    console.print(f"KV heads that were masked, as layer.head: {heads}.")
    console.print(
        f"Loss of all tokens that were scored: {number(scores.loss)} nats, {number(scores.masked_loss)} without these "
        f"heads; of documents it rises by {percent(scores.median)} (median)."
    )
    console.print(
        f"{count(scores.kept)} of {counted(scores.documents, 'document')} are kept, those in which it rises by "
        f"{percent(scores.least)} or more: --set data.path={path}"
    )


def show_report(files: "ReportFiles") -> None:
    """Where everything is."""
    console = make_console()
    console.print(f"The report is in {files.html}, the same as Markdown in {files.markdown}.")
    if files.card is not None:
        console.print(f"The model card {files.card} has a summary of it.")


def show_compared(compared: "ConversionComparison") -> None:
    """A row for each figure and a column for each model, what the numbers are worth, and where the picture is."""
    console = make_console()
    table = make_table(["", *(f">{row.name}" for row in compared.rows)])
    for column in compared.columns:
        found = [row.values.get(column.key) for row in compared.rows]
        table.add_row(column.label, *("-" if one is None else _in_unit(one.value, column.style) for one in found))
    console.print(table)
    console.print()
    for difference in compared.differences:
        if difference.differs is False:
            console.print(f"{difference.column}: {difference.name} is not told apart from {difference.best}")
    for remark in compared.remarks:
        console.print(remark)
    console.print(f"The comparison is in {' and '.join(str(path) for path in compared.files)}.")


def _in_unit(value: float, style: str) -> str:
    if style == "bytes":
        return size(value)
    return amount(value, style) + (f" {'s' if style == 'seconds' else style}" if style in ("ms", "seconds") else "")
