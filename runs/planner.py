"""A recipe made for a model under a budget: which of its KV heads stay full, judged by what is lost without them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from ..attention_modules.geometry import Geometry
from ..attention_modules.growing import SPARE_PART
from ..convert.planning.budget import Budget, Choice, choose, cost_of
from ..convert.planning.importance import write_importance
from ..convert.reading.checkpoint import open_checkpoint
from ..convert.surgery.head import ModelHead
from ..distill.batches import Batch
from ..distill.roles import RoleTraining
from ..distill.trainee import Trainee
from ..evaluate.diagnose.importance import RoleModel, ablation, role_model
from ..evaluate.diagnose.needles import Hidden, divergences
from ..evaluate.engine.progress import Progress
from ..evaluate.tasks.packaged import data_file
from ..evaluate.tasks.textfile import load_tokens
from ..formats import number, percent, ranges
from ..recipes.stages.roles import RolesStage

Measure = Literal["trained", "ablation"]
Unit = Literal["head", "layer"]
BESIDE = 9
"""Bytes of a token in a state besides its key and value."""
PRICE, RATE, PAPER = 3.0, 0.06, "https://arxiv.org/abs/2410.10819"


@dataclass(frozen=True)
class PlanSettings:
    """How a plan is made.

    Attributes:
        budget: what it may cost.
        unit: whether KV heads or whole layers are chosen.
        measure: `trained` learns a share for each head, all at once; `ablation` takes one head away after the other.
        window: newest tokens that a streaming head sees in the model that is made.
        judged_window: the same while heads are judged; shorter, so that short texts tell them apart.
        num_sinks: first tokens that it sees.
        length: tokens of the text whose cache or products are counted.
        tokens: tokens of each text that is measured or trained on.
        steps: steps of `trained`, a text each, or texts of `ablation`.
    """

    budget: Budget
    unit: Unit = "head"
    measure: Measure = "trained"
    window: int = 512
    judged_window: int = 64
    num_sinks: int = 4
    length: int = 32_768
    tokens: int = 512
    steps: int = 60


@dataclass(frozen=True)
class ModelPlan:
    """What each KV head is to be, and why.

    Attributes:
        source: the model as it was named.
        settings: how it was made.
        layers: names of the self-attention layers.
        losses: what each KV head is taken to lose by streaming, by layer.
        full: whether it stays full, by layer.
        cost: share of what the model itself costs.
        predicted: sum of the losses of those that stream, over that of all.
        hidden: divergence from the model itself where something hidden is asked for, on a text that decided nothing,
            in nats.
        ordinary: the same on other tokens.
    """

    source: str
    settings: PlanSettings
    layers: tuple[str, ...]
    losses: tuple[tuple[float, ...], ...]
    full: tuple[tuple[bool, ...], ...]
    cost: float
    predicted: float
    hidden: float
    ordinary: float

    @property
    def kept(self) -> int:
        """KV heads that stay full."""
        return sum(map(sum, self.full))

    @property
    def heads(self) -> int:
        """KV heads in all."""
        return sum(map(len, self.full))


def plan_model(
    source: str,
    text: str | Path,
    settings: PlanSettings,
    *,
    importance: str | Path | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ModelPlan:
    """Choose the KV heads, or layers, of a model that stay full under a budget; the others stream.

    Args:
        source: a local folder or Hub id.
        text: what to judge by: a packaged text, or a `.txt` or `.jsonl` file, or either with `.gz`.
        settings: how.
        importance: where to write what each KV head is taken to lose, for rules of other recipes; None = nowhere.
        device: where to run the model; None means a GPU if there is one.
        trust_remote_code: whether a model that brings its own code may run it.
        progress: called with (done, in all, what is being done).

    Raises:
        CheckpointError: the model cannot be read, or takes no text.
        PlanError: the budget cannot be met, or its attention cannot be converted.
        DataError: the text cannot be used.
    """
    dtype = open_checkpoint(source, trust_remote_code=trust_remote_code).dtype
    roles = role_model(
        source,
        window=settings.judged_window,
        num_sinks=settings.num_sinks,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    geometries = [module.geometry for module in roles.modules]
    costs = [[_costs(settings, geometry, dtype)] * geometry.num_kv_heads for geometry in geometries]
    # Asked before anything slow begins.
    softmax = Choice("softmax", {})
    dense = sum(cost_of(settings.budget.kind, softmax, geometry, settings.length, dtype) for geometry in geometries)
    most = settings.budget.share * dense
    _pick(settings, costs, [[0.0] * len(row) for row in costs], dense)
    if settings.measure == "trained":
        keep = _affordable(costs, most)
        losses = _trained(roles, text, settings, keep, progress)
    else:
        texts = roles.texts(text, number=settings.steps, length=settings.tokens)
        losses = [[loss or 0.0 for loss in row] for row in ablation(roles, texts, progress)]
    if importance is not None:
        write_importance(
            importance,
            source=roles.source,
            modules=roles.modules,
            measures={settings.measure: losses},
            measure=settings.measure,
            settings={settings.measure: {"window": settings.judged_window, "num_sinks": settings.num_sinks}},
        )
    full = _pick(settings, costs, losses, dense)
    pairs = [
        (cost, loss, is_full)
        for row in zip(costs, losses, full, strict=True)
        for cost, loss, is_full in zip(*row, strict=True)
    ]
    hidden, ordinary = _measured(roles, text, settings, full)
    return ModelPlan(
        source=roles.source,
        settings=settings,
        layers=tuple(module.name for module in roles.modules),
        losses=tuple(map(tuple, losses)),
        full=tuple(map(tuple, full)),
        cost=sum(cost[0 if is_full else 1] for cost, _, is_full in pairs) / dense,
        predicted=sum(loss for _, loss, is_full in pairs if not is_full) / max(sum(map(sum, losses)), 1e-12),
        hidden=hidden,
        ordinary=ordinary,
    )


def _costs(settings: PlanSettings, geometry: Geometry, dtype: torch.dtype) -> tuple[int, int]:
    """Of one KV head with its query heads: full, and streaming."""
    head = replace(geometry, num_heads=geometry.num_groups, num_kv_heads=1)
    options = {"window": settings.window, "num_sinks": settings.num_sinks}
    choices = Choice("softmax", {}), Choice("sliding_window", options)
    full, streaming = (cost_of(settings.budget.kind, one, head, settings.length, dtype) for one in choices)
    if settings.budget.kind == "kv_bytes":
        # What a state that keeps all tokens holds besides: room for more, and validity and place of each.
        full += full // SPARE_PART + BESIDE * settings.length
    return full, streaming


def _affordable(costs: Sequence[Sequence[tuple[int, int]]], most: float) -> float:
    """The fraction of the heads that the budget lets stay full."""
    full, streaming = (sum(cost[at] for row in costs for cost in row) for at in (0, 1))
    return max(0.0, min(1.0, (most - streaming) / max(full - streaming, 1)))


def _pick(
    settings: PlanSettings, costs: Sequence[Sequence[tuple[int, int]]], losses: Sequence[Sequence[float]], dense: int
) -> list[list[bool]]:
    """Which KV heads stay full."""
    if settings.unit == "layer":
        layers = [[sum(cost[at] for cost in row) for at in (0, 1)] for row in costs]
        chosen = choose(layers, [[0.0, sum(row)] for row in losses], settings.budget, dense)
        return [[one == 0] * len(row) for one, row in zip(chosen, costs, strict=True)]
    heads = [list(cost) for row in costs for cost in row]
    left = iter(choose(heads, [[0.0, loss] for row in losses for loss in row], settings.budget, dense))
    return [[next(left) == 0 for _ in row] for row in costs]


def _trained(
    roles: RoleModel, text: str | Path, settings: PlanSettings, keep: float, progress: Progress | None
) -> list[list[float]]:
    """The share of full attention that each KV head learns to need when only so many may stay full."""
    stage = RolesStage(
        steps=settings.steps,
        sequence_length=settings.tokens,
        learning_rate=RATE,
        # A few fewer than there is room for, so that what is left over is clear.
        keep=0.9 * keep,
        penalty=PRICE,
    )
    # The last text is for judging the plan.
    ids = _texts(roles, text, settings, settings.steps + 1)[:-1]
    trainee = Trainee(roles.model, tokenizer=roles.tokenizer)
    objective = RoleTraining(trainee, stage)
    (group,) = objective.parameter_groups()
    trainee.train_only(group.parameters.values())
    optimizer = torch.optim.Adam(group.parameters.values(), lr=RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (settings.steps - step) / (0.3 * settings.steps))
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for step in range(settings.steps):
            # The price rises over the first half, while it is found out which heads matter.
            objective.rise = min(1.0, 2 * (step + 1) / settings.steps)
            figures = objective.backward(Batch(ids[step % len(ids)][None]), 1)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if progress is not None:
                loss = number(float(figures.loss))
                progress(step + 1, settings.steps, f"learning which heads need the whole text (loss {loss})")
    roles.model.eval()
    found = []
    for module in roles.modules:
        core = roles.cores.get(module.name)
        shares = [1.0] * module.geometry.num_kv_heads if core is None else core.alpha.detach().clamp(0, 1).tolist()
        found.append(shares)
    return found


def _texts(roles: RoleModel, text: str | Path, settings: PlanSettings, count: int) -> tuple[torch.Tensor, ...]:
    length = settings.tokens
    ids = load_tokens(data_file(str(text)), roles.tokenizer, context=length, limit=count * length)
    return tuple(ids[: max(length, ids.numel() // length * length)].split(length))


@torch.no_grad()
def _measured(
    roles: RoleModel, text: str | Path, settings: PlanSettings, full: Sequence[Sequence[bool]]
) -> tuple[float, float]:
    """How far the plan is from the model itself on the last text, where something is asked for and elsewhere."""
    hidden: Hidden = roles.texts(text, number=settings.steps + 1, length=settings.tokens, seed=1)[-1]
    head, places = ModelHead(roles.model), torch.cat([hidden.answers, hidden.others])
    logits = []
    for whole in (True, False):
        for module, own in zip(roles.modules, full, strict=True):
            core = roles.cores.get(module.name)
            if core is not None:
                core.alpha.copy_(torch.tensor([float(whole or one) for one in own]))
        states = head.hidden_states(input_ids=hidden.ids.to(roles.model.device), use_cache=False)
        logits.append(head.logits(states[:, places]))
    found = divergences(logits[1], logits[0])[0]
    answers = len(hidden.answers)
    return float(found[:answers].mean()), float(found[answers:].mean()) if len(found) > answers else 0.0


def plan_yaml(plan: ModelPlan, *, name: str) -> str:
    """A plan as a recipe, with its reasons as comments.

    Args:
        plan: what `plan_model` returned.
        name: the recipe's name.
    """
    settings = plan.settings
    same: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for layer, own in enumerate(plan.full):
        kept = tuple(head for head, is_full in enumerate(own) if is_full)
        if kept:
            same[kept].append(layer)
    lines = [
        f"# Made for {plan.source} with a budget of {settings.budget}: {plan.kept} of {plan.heads} KV heads stay full,",
        f"# the others see {settings.num_sinks} first tokens and the {settings.window} newest. It costs "
        f"{percent(plan.cost)} at {settings.length:,} tokens; on a text that",
        f"# decided nothing it is {number(plan.hidden)} nats from the model where something hidden is asked for, and "
        f"{number(plan.ordinary)} elsewhere.",
    ]
    head = {
        "name": name,
        "description": f"{plan.kept} of {plan.heads} KV heads stay full, the others stream; made for a budget.",
        "paper": PAPER,
    }
    blocks = ["\n".join(lines), _yaml(head), "attention:"]
    for kept, layers in same.items():
        reasons = ", ".join(
            f"{layer}.{number_} ({number(plan.losses[layer][number_])})" for layer in layers for number_ in kept
        )
        is_whole = all(len(kept) == len(plan.full[layer]) for layer in layers)
        rule: dict[str, Any] = {"layers": ranges(layers).replace(" ", "")}
        if not is_whole:
            rule["heads"] = ",".join(map(str, kept))
        blocks += [f"  # By {settings.measure}: {reasons}.", _rule({**rule, "method": "softmax"})]
    options = {"window": settings.window, "num_sinks": settings.num_sinks}
    blocks += ["  # All other KV heads.", _rule({"layers": "all", "method": "sliding_window", "options": options})]
    return "\n".join([*blocks, "stages: []", ""])


def _yaml(values: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10_000)
    return text.strip()


def _rule(rule: dict[str, Any]) -> str:
    return "\n".join(f"  {line}" for line in _yaml([rule]).splitlines())  # type: ignore[arg-type]
