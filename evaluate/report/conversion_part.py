"""What was converted: the strip of layers, methods and new parameters."""

from collections import Counter
from functools import partial

from ...attention_modules.registry import get_method
from ...formats import counted, options, ranges
from .blocks import Cell, Chart, Charts, Section, Table, section, texts
from .cells import count_cell
from .gathering import UNCHANGED, ConvertedModule, Report
from .heatmaps import SINGLE_HEADS, method_colors, strip_chart

SOFTMAX = "softmax"


def conversion_section(report: Report) -> Section | None:
    """Which layers became what."""
    if not report.modules:
        return None
    return section("converted", "What was converted", [_strip(report), _table(report)])


def layers_of(report: Report) -> list[str]:
    """The method of each layer of the model, `unchanged` where it is the base's own."""
    found = {
        module.entry.layer_idx if module.entry.layer_idx is not None else place: module.entry.method
        for place, module in enumerate(report.modules)
    }
    count = max(report.num_layers or 0, max(found, default=-1) + 1)
    return [found.get(layer, UNCHANGED) for layer in range(count)]


def kv_heads_of(report: Report) -> list[tuple[str, ...]]:
    """The method of each KV head of each layer; empty if all heads of a layer have the same, for all layers."""
    if not any(len(set(module.entry.head_methods)) > 1 for module in report.modules):
        return []
    found = {
        module.entry.layer_idx if module.entry.layer_idx is not None else place: tuple(
            UNCHANGED if method == SOFTMAX else method for method in module.entry.head_methods
        )
        for place, module in enumerate(report.modules)
    }
    kept = (UNCHANGED,) * report.modules[0].entry.geometry.num_kv_heads
    return [found.get(layer, kept) for layer in range(len(layers_of(report)))]


def _strip(report: Report) -> Charts:
    layers, kv_heads = layers_of(report), kv_heads_of(report)
    if kv_heads:
        counts = Counter(method for own in kv_heads for method in own)
        colors = method_colors(list(counts), UNCHANGED)
        said = f"{len(layers)} layers of {len(kv_heads[0])} KV heads"
        places = [f"{counted(counts[method], 'KV head')} {method}" for method in colors]
        drawn = partial(strip_chart, kv_heads, "KV head", colors)
    else:
        heads = report.num_heads or report.modules[0].entry.geometry.num_heads
        # All heads of a layer have one method; where there are many, one box stands for all of them.
        count = heads if heads <= SINGLE_HEADS else 1
        colors = method_colors(list(dict.fromkeys(layers)), UNCHANGED)
        said = f"{len(layers)} layers of {heads} heads"
        places = [f"{method} in {ranges([i for i, name in enumerate(layers) if name == method])}" for method in colors]
        label = "head" if count == heads else f"{heads} heads"
        drawn = partial(strip_chart, [(method,) * count for method in layers], label, colors)
    description = f"{said}, coloured by their attention: {'; '.join(places)}."
    return Charts((Chart("layers", "Attention by layer and head", description, drawn),))


def _table(report: Report) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for method, modules in report.methods.items():
        for settings, members in _alike(modules).items():
            rows.append(
                (
                    Cell(method),
                    Cell(get_method(method).summary),
                    Cell(_places(members)),
                    count_cell(len(members)),
                    Cell(settings),
                    count_cell(sum(module.parameters for module in members)),
                )
            )
    kept = [layer for layer, method in enumerate(layers_of(report)) if method == UNCHANGED]
    if kept:
        rows.append((*texts(UNCHANGED, "as in the base", ranges(kept)), count_cell(len(kept)), Cell(""), count_cell(0)))
    columns = ("attention", "what it is", "layers", "modules", "options", "new parameters")
    return Table("Methods", columns, tuple(rows))


def _alike(modules: list[ConvertedModule]) -> dict[str, list[ConvertedModule]]:
    """Modules by their options in words."""
    found: dict[str, list[ConvertedModule]] = {}
    for module in modules:
        found.setdefault(options(module.entry.options), []).append(module)
    return found


def _places(modules: list[ConvertedModule]) -> str:
    indices = [module.entry.layer_idx for module in modules]
    known = [index for index in indices if index is not None]
    return ranges(known) if len(known) == len(indices) else ", ".join(module.entry.name for module in modules)
