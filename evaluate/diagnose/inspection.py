"""What a model's attention looks like and what a recipe would make of it, from its configuration alone."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ...attention_modules import AttentionModule, Geometry, create
from ...convert.planning.plan import Plan, PlanEntry, make_plan, unmatched_rules
from ...convert.planning.probe import ProbedModule, probe
from ...convert.reading.checkpoint import model_class_of
from ...convert.reading.config_file import check_config, read_config
from ...convert.reading.gguf_file import read_gguf
from ...convert.reading.links import describe_overwritten, overwritten_links
from ...convert.reading.sources import locate
from ...convert.writing.serving import serving_lines
from ...files.json_files import read_json
from ...files.own_files import CONFIG_FILE, SECTION
from ...formats import ranges
from ...recipes import Recipe
from ..bench.footprint import LENGTHS, CachedLayer, Footprint, footprints, native_window
from .rewriting import RewriteOutlook, foresee
from .stages import StageOutlook, outlook_of

OUTPUT = "DIR"
"""What the result of a recipe is called where nobody has named it yet."""


@dataclass(frozen=True)
class ModuleGroup:
    """Consecutive attention modules that are alike and meet the same fate.

    Attributes:
        modules: their names as one, such as `model.layers.0-29.self_attn`.
        count: how many they are.
        class_name: class of the modules in transformers.
        geometry: head counts and sizes of each.
        method: what they become; None if they stay as they are.
        options: options of the method.
        parameters: new parameters of all of them together.
        lossy: what the method would drop of what they do now.
        refused: why they cannot be converted; None if they can.
    """

    modules: str
    count: int
    class_name: str
    geometry: Geometry
    method: str | None
    options: Mapping[str, Any]
    parameters: int
    lossy: tuple[str, ...]
    refused: str | None


@dataclass(frozen=True)
class Inspection:
    """The answer of `inspect_model`.

    Attributes:
        source: the model as it was named.
        model_type: its type in transformers.
        class_name: its class.
        dtype: its dtype, which keys and values have too.
        recipe: name of the recipe; None if none was asked about.
        already_converted: whether the model carries a conversion, which is then what the groups show.
        groups: the attention modules in order.
        footprints: bytes per sequence at several lengths; empty for a model that generates nothing.
        unmatched: a sentence for each attention rule of the recipe that matches no layer.
        rewrite: what its rewrites make of the model, which is then what the groups show; None without any.
        overwritten: a sentence if weights that the conversion shares with its base were overwritten, else None.
        stages: what the recipe's stages read, in order; empty without a recipe, or where it does not apply.
        serving: what is known of engines that serve the model as it is, or as a recipe's rewrites make it, a line each;
            empty for models that need this package.
    """

    source: str
    model_type: str
    class_name: str
    dtype: str
    recipe: str | None
    already_converted: bool
    groups: tuple[ModuleGroup, ...]
    footprints: tuple[Footprint, ...]
    unmatched: tuple[str, ...] = ()
    rewrite: RewriteOutlook | None = None
    overwritten: str | None = None
    serving: tuple[str, ...] = ()
    stages: tuple[StageOutlook, ...] = ()

    @property
    def num_modules(self) -> int:
        """Attention modules found."""
        return sum(group.count for group in self.groups)

    @property
    def num_converted(self) -> int:
        """Attention modules that are or would be converted."""
        return sum(group.count for group in self.groups if group.method is not None and group.refused is None)

    @property
    def parameters(self) -> int:
        """New parameters in all."""
        return sum(group.parameters for group in self.groups)

    @property
    def is_open(self) -> bool:
        """Whether the recipe can be carried out, as far as is known."""
        refused = self.already_converted or self.overwritten or (self.rewrite is not None and self.rewrite.refused)
        return not (refused or self.unmatched or any(group.refused for group in self.groups))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **asdict(self),
            "num_modules": self.num_modules,
            "num_converted": self.num_converted,
            "parameters": self.parameters,
        }


def inspect_model(
    source: str,
    *,
    recipe: Recipe | None = None,
    lengths: Sequence[int] = LENGTHS,
    trust_remote_code: bool = False,
) -> Inspection:
    """Probe a model's attention without its weights, which of a Hub model are not even downloaded, and plan a recipe.

    Args:
        source: a local folder, Hub id or `.gguf` file.
        recipe: what to plan; what it would lose or be refused is reported, not raised.
        lengths: tokens of the sequences whose cache is counted.
        trust_remote_code: whether a model that brings its own code may run it.

    Raises:
        CheckpointError: the model cannot be read or is refused.
        PlanError: its attention cannot be found.
        RecipeError: the recipe names layers that the model does not have.
    """
    config, dtype = open_config(source, trust_remote_code)
    model_class = model_class_of(config, trust_remote_code=trust_remote_code)
    probed = probe(config, model_class)
    carried = getattr(config, SECTION, None)
    shown = (config.model_type, model_class.__name__, str(dtype).removeprefix("torch."))
    before = footprints(_cached(config, probed, {}), dtype, lengths)
    rewrite = None
    if recipe is not None and recipe.rewrite and carried is None:
        rewrite, changed = rewritten_config(source, recipe, trust_remote_code)
        if changed is not None:
            config, model_class = changed, model_class_of(changed)
            probed, dtype = probe(config, model_class), dtype_of(config)
    entries: Iterable[PlanEntry] = ()
    unmatched: tuple[str, ...] = ()
    if carried is not None:
        entries = Plan.from_config(carried).entries
    elif recipe is not None:
        entries = make_plan(recipe.attention, probed, check=False).entries
        unmatched = unmatched_rules(recipe.attention, probed)
    by_name = {entry.name: entry for entry in entries}
    cores = {module.name: _build(module, by_name.get(module.name)) for module in probed}
    ordinary = carried is None and (recipe is None or (rewrite is not None and rewrite.refused is None))
    ordinary = ordinary and not any(cores.values())
    layers = _cached(config, probed, cores)
    after = footprints(layers, dtype, lengths)
    rows = (Footprint(old.tokens, old.before, new.after) for old, new in zip(before, after, strict=True))
    return Inspection(
        source=source,
        model_type=shown[0],
        class_name=shown[1],
        dtype=shown[2],
        recipe=None if recipe is None else recipe.name,
        already_converted=carried is not None,
        groups=group_modules(probed, by_name, cores),
        footprints=tuple(rows) if layers else (),
        unmatched=unmatched,
        rewrite=rewrite,
        overwritten=None if carried is None else _overwritten(Path(source).expanduser()),
        serving=_serving(OUTPUT if rewrite is not None else source, config, model_class.__name__) if ordinary else (),
        stages=outlook_of(recipe) if carried is None else (),
    )


def _cached(
    config: PreTrainedConfig, probed: Sequence[ProbedModule], cores: Mapping[str, AttentionModule | None]
) -> list[CachedLayer]:
    return [
        CachedLayer(module.geometry, native_window(config, module.layer_idx), cores.get(module.name))
        for module in probed
        if module.self_attention and module.geometry.causal
    ]


def rewritten_config(
    source: str, recipe: Recipe, trust_remote_code: bool
) -> tuple[RewriteOutlook, PreTrainedConfig | None]:
    """What rewrites make of a model, and the configuration of the result; None if they are refused."""
    folder = locate(source, trust_remote_code=trust_remote_code).folder
    config = read_json(folder / CONFIG_FILE)
    outlook, after = foresee(source, folder, config, recipe, trust_remote_code=trust_remote_code)
    if outlook.refused is not None:
        return outlook, None
    # A copy: reading a configuration takes keys out of what it is given.
    return outlook, CONFIG_MAPPING[after["model_type"]].from_dict(dict(after))


def _overwritten(folder: Path) -> str | None:
    names = overwritten_links(folder)
    return describe_overwritten(folder, names) if names else None


def _serving(source: str, config: PreTrainedConfig, architecture: str) -> tuple[str, ...]:
    return serving_lines(source, {**config.to_dict(), "architectures": [architecture]})


def open_config(source: str, trust_remote_code: bool) -> tuple[PreTrainedConfig, torch.dtype]:
    """A model's configuration and dtype; its weights stay where they are."""
    location = locate(source, trust_remote_code=trust_remote_code)
    if location.gguf_file is not None:
        return read_gguf(location.folder / location.gguf_file)
    check_config(
        read_json(location.folder / CONFIG_FILE), source, trust_remote_code=trust_remote_code, allow_converted=True
    )
    config = read_config(location.folder, trust_remote_code=trust_remote_code)
    return config, dtype_of(config)


def dtype_of(config: PreTrainedConfig) -> torch.dtype:
    """The dtype of a model's weights, float32 if its configuration does not say."""
    dtype = config.get_text_config().dtype or config.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _build(module: ProbedModule, entry: PlanEntry | None) -> AttentionModule | None:
    """The module that the plan puts in, on the meta device; None where nothing changes."""
    if entry is None or not entry.converted:
        return None
    with torch.device("meta"):
        return create(entry.method, module.geometry, **entry.options)


def group_modules(
    probed: Sequence[ProbedModule],
    entries: Mapping[str, PlanEntry],
    cores: Mapping[str, AttentionModule | None],
) -> tuple[ModuleGroup, ...]:
    """Collapse consecutive modules whose names differ by numbers only and whose rows would be equal."""
    rows = []
    for module in probed:
        entry, core = entries.get(module.name), cores[module.name]
        changed = entry is not None and (entry.converted or entry.refused is not None)
        rows.append(
            ModuleGroup(
                modules=module.name,
                count=1,
                class_name=module.class_name,
                geometry=module.geometry,
                method=entry.method if entry is not None and changed else None,
                options={} if core is None else core.options.model_dump(),
                parameters=0 if core is None else sum(parameter.numel() for parameter in core.parameters()),
                lossy=() if entry is None else tuple(entry.lossy),
                refused=None if entry is None else entry.refused,
            )
        )
    groups = []
    for _, alike in groupby(rows, key=_likeness):
        members = list(alike)
        groups.append(_merge(members))
    return tuple(groups)


def _likeness(row: ModuleGroup) -> tuple[Any, ...]:
    name = re.sub(r"\d+", "#", row.modules)
    return (name, row.class_name, row.geometry, row.method, sorted(row.options.items()), row.lossy, row.refused)


def _merge(members: Sequence[ModuleGroup]) -> ModuleGroup:
    first = members[0]
    values = {**vars(first)}
    values["modules"] = join_names([member.modules for member in members])
    values["count"] = len(members)
    values["parameters"] = sum(member.parameters for member in members)
    return ModuleGroup(**values)


def join_names(names: Sequence[str]) -> str:
    """One name for modules whose names differ in their numbers: `a.0.b`, `a.1.b`, `a.3.b` are `a.0-1,3.b`."""
    columns = list(zip(*(re.split(r"(\d+)", name) for name in names), strict=True))
    varying = [index for index, column in enumerate(columns) if len(set(column)) > 1]
    if len(varying) > 1:
        return f"{names[0]} ... {names[-1]}"
    parts = [ranges(int(part) for part in c).replace(" ", "") if i in varying else c[0] for i, c in enumerate(columns)]
    return "".join(parts)
