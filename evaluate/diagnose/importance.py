"""How much each KV head of a model matters: by pattern, by what it adds, by what is lost without it, or as trained."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...attention_modules.heads.head_roles import HeadRolesAttention
from ...convert.planning.importance import HeadImportance, write_importance
from ...convert.planning.probe import ProbedModule, probe
from ...convert.reading.checkpoint import load_model, load_tokenizer, open_checkpoint
from ...convert.rewriting.moments import MomentSums
from ...convert.surgery.attention_function import AttentionCall, attention_hook, core_of
from ...convert.surgery.head import ModelHead, answering
from ...convert.surgery.in_memory import convert_model
from ...convert.surgery.swap import converted_modules
from ...errors import CheckpointError, PlanError
from ..engine.models import find_device
from ..engine.progress import Progress
from ..tasks.packaged import data_file
from ..tasks.textfile import load_tokens
from .measures import NUM_SINKS
from .needles import Hidden, Needles, divergences
from .profiles import Diagnosis

ROLES = "head_roles"
SEED = 0


@dataclass
class RoleModel:
    """A model in which each KV head can be full or streaming, and texts to tell what that does.

    Attributes:
        source: the model as it was named.
        model: the model, all of whose layers are `head_roles`.
        tokenizer: its tokenizer.
        modules: its self-attention layers in order.
    """

    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    modules: tuple[ProbedModule, ...]
    cores: dict[str, HeadRolesAttention] = field(init=False)

    def __post_init__(self) -> None:
        found = converted_modules(self.model)
        self.cores = {
            module.name: cast(HeadRolesAttention, core_of(found[module.name]))
            for module in self.modules
            if module.name in found
        }

    def texts(self, text: str | Path, *, number: int, length: int, seed: int = SEED) -> list[Hidden]:
        """Texts of so many tokens with something hidden in each, the same for the same seed.

        Args:
            text: where they are cut from; a packaged text or a file.
            number: how many.
            length: tokens of each.
            seed: of what is hidden where.

        Raises:
            DataError: the text cannot be used, or is too short.
        """
        ids = load_tokens(data_file(str(text)), self.tokenizer, context=length, limit=number * length)
        needles = Needles(self.tokenizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return [needles.hide(part) for part in ids[: ids.numel() // length * length].split(length)]


def role_model(
    source: str, *, window: int, num_sinks: int, device: str | None = None, trust_remote_code: bool = False
) -> RoleModel:
    """Load a model, and let each of its KV heads be full or streaming.

    Args:
        source: a local folder or Hub id of a model that was not converted.
        window: newest tokens that a streaming head sees.
        num_sinks: first tokens that it sees.
        device: where to run it; None means a GPU if there is one.
        trust_remote_code: whether a model that brings its own code may run it.

    Raises:
        CheckpointError: it cannot be read, or takes no text.
        PlanError: its attention cannot be converted.
    """
    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
    loaded = load_tokenizer(checkpoint)
    tokenizer = getattr(loaded, "tokenizer", loaded)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise CheckpointError(f"{source} comes without a tokenizer, and its heads are judged by text")
    model = load_model(checkpoint, device=find_device(device), dtype=torch.float32)
    modules = tuple(module for module in probe(model.config, type(model)) if module.self_attention)
    convert_model(model, ROLES, window=window, num_sinks=num_sinks)
    return RoleModel(checkpoint.source, model.requires_grad_(False), tokenizer, modules)


@torch.no_grad()
def ablation(roles: RoleModel, texts: Sequence[Hidden], progress: Progress | None = None) -> list[list[float | None]]:
    """The divergence from the model itself when one KV head after the other streams, by layer and KV head.

    It is the mean over what was hidden and is asked for plus the mean over other tokens, in nats. Layers before that
    of the head are not run again.

    Args:
        roles: the model.
        texts: what to measure on.
        progress: called with (heads done, heads in all, what is being done).
    """
    rows: list[list[float | None]] = [[0.0] * module.geometry.num_kv_heads for module in roles.modules]
    total, done = len(texts) * sum(map(len, rows)), 0
    head = ModelHead(roles.model)
    for text in texts:
        places = torch.cat([text.answers, text.others]).to(roles.model.device)
        outputs: dict[str, Any] = {}
        with _recording(roles.model, roles.cores, outputs):
            taught = head.hidden_states(input_ids=text.ids.to(roles.model.device), use_cache=False)[:, places]
        base = head.logits(taught)
        for index, module in enumerate(roles.modules):
            core = roles.cores.get(module.name)
            for number in range(module.geometry.num_kv_heads):
                done += 1
                if core is None:
                    rows[index][number] = None
                    continue
                with ExitStack() as stack:
                    for before in roles.modules[:index]:
                        if before.name in outputs:
                            stack.enter_context(
                                answering(roles.model.get_submodule(_block(before.name)), outputs[before.name])
                            )
                    core.alpha[number] = 0.0
                    try:
                        ids = text.ids.to(roles.model.device)
                        found = head.hidden_states(input_ids=ids, use_cache=False)[:, places]
                    finally:
                        core.alpha[number] = 1.0
                lost = _lost(divergences(head.logits(found), base)[0], len(text.answers)) / len(texts)
                rows[index][number] = (rows[index][number] or 0.0) + float(lost)
                if progress is not None:
                    progress(done, total, "taking heads away")
    return rows


def _lost(found: Tensor, answers: int) -> Tensor:
    return found[:answers].mean() + (found[answers:].mean() if len(found) > answers else 0.0)


def _block(name: str) -> str:
    """The layer that an attention module belongs to: `model.layers.3` of `model.layers.3.self_attn`."""
    return name.rpartition(".")[0]


class _recording(ExitStack):  # noqa: N801
    """Within the context, what each layer with a core gives is noted by its attention's name."""

    def __init__(self, model: nn.Module, cores: Mapping[str, Any], outputs: dict[str, Any]) -> None:
        super().__init__()
        for name in cores:

            def note(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
                outputs[name] = output

            handle = model.get_submodule(_block(name)).register_forward_hook(note)
            self.callback(handle.remove)


@torch.no_grad()
def contribution(roles: RoleModel, texts: Sequence[Hidden]) -> list[list[float | None]]:
    """The mean length of what each KV head, with its query heads, adds to the hidden states, by layer and KV head."""
    sums: dict[str, MomentSums] = {}
    modules = converted_modules(roles.model)
    for name in roles.cores:
        projection = getattr(modules[name], "o_proj", None)
        if isinstance(projection, nn.Linear):
            sums[name] = MomentSums(projection.weight, roles.cores[name].geometry.num_kv_heads)

    def look(call: AttentionCall) -> Tensor:
        out = call.teacher()
        if call.name in sums:
            sums[call.name].add_outputs(out.transpose(1, 2).flatten(2))
            sums[call.name].tokens += out.shape[2]
        return out

    with attention_hook(roles.model, look):
        for text in texts:
            roles.model.base_model(input_ids=text.ids.to(roles.model.device), use_cache=False)
    return [
        sums[module.name].means().contributions.tolist()
        if module.name in sums
        else [None] * module.geometry.num_kv_heads
        for module in roles.modules
    ]


def by_pattern(
    diagnosis: Diagnosis, modules: Sequence[ProbedModule]
) -> tuple[dict[str, list[list[float | None]]], list[list[str]]]:
    """What a diagnosis says of KV heads: of the query heads that share one, the one that needs most decides.

    Args:
        diagnosis: of the model.
        modules: its self-attention layers in order.

    Returns:
        the measures `retrieval` (mass on what followed the same token earlier) and `outside` (mass outside of sinks
        and window), and roles, by layer and KV head; roles are empty for layers that were not diagnosed.
    """
    layers = {layer.index: layer for layer in diagnosis.layers}
    retrieval: list[list[float | None]] = []
    outside: list[list[float | None]] = []
    roles: list[list[str]] = []
    order = ("retrieval", "global", "streaming", "local")
    for index, module in enumerate(modules):
        count, size = module.geometry.num_kv_heads, module.geometry.num_groups
        layer = layers.get(index)
        if layer is None:
            retrieval.append([None] * count)
            outside.append([None] * count)
            roles.append([""] * count)
            continue
        groups = [layer.heads[start : start + size] for start in range(0, count * size, size)]
        retrieval.append([max(head.induction or 0.0 for head in group) for group in groups])
        outside.append([max(1 - head.streaming_mass for head in group) for group in groups])
        roles.append([min((head.role for head in group), key=order.index) for group in groups])
    return {"retrieval": retrieval, "outside": outside}, roles


def trained_importance(source: str, path: str | Path, *, trust_remote_code: bool = False) -> HeadImportance | None:
    """Write down the shares that a conversion to `head_roles` learned; None if the model is no such conversion.

    Args:
        source: the converted model's folder.
        path: the file of importance.
        trust_remote_code: whether a model that brings its own code may run it.

    Raises:
        PlanError: some of its layers are something else.
    """
    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code, allow_converted=True)
    if not checkpoint.is_converted:
        return None
    model = load_model(checkpoint)
    cores = {name: core_of(module) for name, module in converted_modules(model).items()}
    if not any(isinstance(core, HeadRolesAttention) for core in cores.values()):
        return None
    modules = [module for module in probe(model.config, type(model)) if module.self_attention]
    shares = []
    for module in modules:
        core = cores.get(module.name)
        if not isinstance(core, HeadRolesAttention):
            raise PlanError(f"{module.name} of {source} is not {ROLES!r}, so it learned no shares")
        shares.append(core.alpha.detach().clamp(0, 1).tolist())
    options = cores[modules[0].name].options.model_dump()
    return write_importance(
        path,
        source=checkpoint.name,
        modules=modules,
        measures={"trained": shares},
        measure="trained",
        settings={"trained": options},
    )


def measure_importance(
    source: str,
    diagnosis: Diagnosis,
    path: str | Path,
    *,
    texts: int = 2,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> HeadImportance:
    """Write how much each KV head matters: `ablation`, `contribution`, `retrieval` and `outside`, with roles.

    Args:
        source: a local folder or Hub id.
        diagnosis: what `diagnose_model` found; its text, context and window are taken here too.
        path: the JSON file.
        texts: texts with something hidden that heads are taken away on.
        device: where to run the model; None means a GPU if there is one.
        trust_remote_code: whether a model that brings its own code may run it.
        progress: called with (done, in all, what is being done).

    Raises:
        PlanError: the model's attention cannot be full in some heads and streaming in others.
        DataError: the text cannot be used, or another file is there.
    """
    roles = role_model(
        source, window=diagnosis.window, num_sinks=NUM_SINKS, device=device, trust_remote_code=trust_remote_code
    )
    hidden = roles.texts(diagnosis.text, number=texts, length=diagnosis.context)
    patterns, names = by_pattern(diagnosis, roles.modules)
    measures = {
        "ablation": ablation(roles, hidden, progress),
        "contribution": contribution(roles, hidden),
        **patterns,
    }
    settings = {"ablation": {"window": diagnosis.window, "num_sinks": NUM_SINKS, "text": Path(diagnosis.text).name}}
    return write_importance(
        path,
        source=diagnosis.source,
        modules=roles.modules,
        measures=measures,
        measure="ablation",
        roles=names,
        settings=settings,
    )
