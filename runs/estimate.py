"""What a conversion will cost, before anything is spent: tokens, memory, time and disk; nothing is written."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..convert.planning.plan import Plan, make_plan
from ..convert.planning.probe import probe
from ..convert.reading.checkpoint import load_tokenizer, model_class_of, open_checkpoint
from ..convert.reading.sources import locate
from ..convert.reading.weight_files import weight_files
from ..convert.surgery.swap import apply_plan, converted_modules
from ..distill.healing import DTYPES
from ..distill.probing import ProbedStep, probe_steps
from ..distill.progress import Progress, Silent
from ..distill.run import Run
from ..distill.targets import find_targets
from ..distill.team import find_team
from ..distill.work_folder import WorkFolder
from ..errors import PlanError
from ..evaluate.diagnose.inspection import dtype_of, open_config, rewritten_config
from ..evaluate.diagnose.stages import StageOutlook
from ..recipes import LoraPart, Recipe, StageBase

# An fp32 number that trains, its gradient, and AdamW's two moments.
TRAINING_BYTES = 16
# Of a layer's graph, in sizes of its hidden states and of its feed-forward: norms, projections, attention, residuals.
KEPT_HIDDEN, KEPT_INNER = 16, 3


@dataclass(frozen=True)
class StageEstimate:
    """What one stage costs on one device.

    Attributes:
        reads: what it reads.
        weights_bytes: the model with its new attention and adapters; computed.
        teacher_bytes: a teacher that is a model of its own; computed.
        training_bytes: gradients and AdamW's moments beside what trains; computed, of the stage's own parameters if a
            step was run.
        activation_bytes: roughly what a step keeps for its gradients; computed.
        peak_bytes: highest memory of a step above weights, adapters and teacher; None if it was not measured.
        step_seconds: of a step at each length, measured; empty if none was run.
        seconds: of all steps together; None if none was run.
    """

    reads: StageOutlook
    weights_bytes: int
    teacher_bytes: int
    training_bytes: int
    activation_bytes: int
    peak_bytes: int | None = None
    step_seconds: tuple[float, ...] = ()
    seconds: float | None = None


@dataclass(frozen=True)
class Estimate:
    """What a conversion costs.

    Attributes:
        device: where steps were run, or would be.
        stages: in order.
        result_bytes: of the result's weights; computed.
        work_bytes: the most that the files of an unfinished run take beside it; computed.
        not_measured: why no step was run; None if steps were.
    """

    device: str
    stages: tuple[StageEstimate, ...]
    result_bytes: int
    work_bytes: int
    not_measured: str | None = None

    @property
    def seconds(self) -> float | None:
        """Of all steps of all stages; None if none was run."""
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if known and len(known) == len(self.stages) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "seconds": self.seconds}


def estimate(
    source: str,
    recipe: Recipe,
    *,
    trust_remote_code: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> Estimate:
    """Compute what a conversion takes, and run a step of each stage if the model is on this machine.

    Args:
        source: a local folder, Hub id or `.gguf` file; of weights that are not here nothing is downloaded.
        recipe: the recipe.
        trust_remote_code: whether a model that brings its own code may run it.
        device: where to compute; None means the accelerator if there is one.
        progress: whom to tell.

    Raises:
        AttnConvError: the conversion would be refused.
    """
    config, dtype = open_config(source, trust_remote_code)
    rewritten_bytes, teacher_bytes = 0, 0
    if recipe.rewrite:
        outlook, changed = rewritten_config(source, recipe, trust_remote_code)
        if changed is None:
            raise PlanError(str(outlook.refused))
        config, dtype = changed, dtype_of(changed)
        rewritten_bytes, teacher_bytes = outlook.bytes_after or 0, outlook.teacher_bytes or 0
    model, plan = _outline(config, recipe, trust_remote_code)
    team = find_team(device)
    why_not = _why_not(source, recipe, trust_remote_code)
    probed: list[ProbedStep] = []
    if why_not is None:
        checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(checkpoint)
        work = WorkFolder(Path("never-made"))
        probed += probe_steps(Run(checkpoint, plan, recipe, tokenizer, team, work, progress or Silent()))
    sizes = _Sizes.of(model, recipe.stages)
    stages = [
        _measured(_computed(sizes, recipe.stages, index, config, teacher_bytes), recipe.stages[index], found)
        for index, found in enumerate(_by_stage(probed, len(recipe.stages)))
    ]
    # The checkpoint before is removed when the next one is whole.
    saved = [4 * sizes.trainable(index) + stage.training_bytes // 2 for index, stage in enumerate(stages)]
    kept = dtype if recipe.output.dtype is None else getattr(torch, recipe.output.dtype)
    return Estimate(
        device=str(team.device),
        stages=tuple(stages),
        result_bytes=sizes.model * kept.itemsize + 4 * sizes.cores,
        work_bytes=2 * max(saved, default=0) + (rewritten_bytes if recipe.stages else 0),
        not_measured=why_not,
    )


@dataclass(frozen=True)
class _Sizes:
    """Numbers of a converted model: its own, its cores', and the adapters' of each stage."""

    model: int
    cores: int
    adapters: tuple[int, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, stages: Sequence[StageBase]) -> "_Sizes":
        cores = sum(
            parameter.numel() for module in converted_modules(model).values() for parameter in _core_parameters(module)
        )
        adapters = tuple(0 if stage.adapter is None else _adapter_size(model, stage.adapter) for stage in stages)
        return cls(sum(parameter.numel() for parameter in model.parameters()) - cores, cores, adapters)

    def trainable(self, index: int) -> int:
        """Numbers that have been trained, or are, by the stage of this index."""
        return self.cores + sum(self.adapters[: index + 1])


def _core_parameters(module: Any) -> list[torch.nn.Parameter]:
    return list(module.attnconv.parameters())


def _adapter_size(model: PreTrainedModel, settings: LoraPart) -> int:
    """Numbers of low-rank updates."""
    targets = find_targets(model, settings)
    shapes = [getattr(model.get_submodule(name), "weight").shape for name in targets.modules]  # noqa: B009
    fused = [model.get_parameter(name).shape for name in targets.parameters]
    pairs = sum(sum(shape) for shape in shapes) + sum(shape[0] * sum(shape[1:]) for shape in fused)
    return settings.rank * pairs


def _outline(config: PreTrainedConfig, recipe: Recipe, trust_remote_code: bool) -> tuple[PreTrainedModel, Plan]:
    """The converted model without weights, and the plan."""
    model_class = model_class_of(config, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = model_class._from_config(copy.deepcopy(config))
    plan = Plan(())
    if recipe.attention:
        plan = make_plan(recipe.attention, probe(config, model_class), allow_lossy=True)
        apply_plan(model, plan)
    return model, plan


def _why_not(source: str, recipe: Recipe, trust_remote_code: bool) -> str | None:
    """Why no step can be run without writing or downloading anything; None if one can."""
    if not recipe.stages:
        return "the recipe has no stages"
    if recipe.rewrite:
        return "the rewritten weights would have to be written first"
    location = locate(source, trust_remote_code=trust_remote_code)
    names = weight_files(location.folder) if location.gguf_file is None else []
    if not all((location.folder / name).is_file() for name in names):
        return "the weights are not on this machine"
    return None


def _by_stage(probed: Sequence[ProbedStep], number: int) -> list[list[ProbedStep]]:
    return [[step for step in probed if step.stage == index] for index in range(number)]


def _computed(
    sizes: _Sizes, stages: Sequence[StageBase], index: int, config: PreTrainedConfig, teacher_bytes: int
) -> StageEstimate:
    """What follows from sizes alone."""
    stage = stages[index]
    size = DTYPES[stage.precision].itemsize
    added = sizes.trainable(index)
    trains_cores = getattr(stage, "train_cores", True)
    trained = sizes.adapters[index] + (sizes.cores if trains_cores else 0)
    return StageEstimate(
        reads=StageOutlook.of(stage),
        weights_bytes=sizes.model * size + 4 * added,
        teacher_bytes=teacher_bytes if stage.has_teacher else 0,
        training_bytes=(TRAINING_BYTES - 4) * trained,
        activation_bytes=_activations(stage, config, size),
    )


def _activations(stage: StageBase, config: PreTrainedConfig, size: int) -> int:
    """Roughly the bytes that a step keeps for its gradients: of one layer where layers learn one by one."""
    text: Any = config.get_text_config()
    hidden = int(getattr(text, "hidden_size", 0))
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    layers = 1 if stage.measures_layers else int(getattr(text, "num_hidden_layers", 1))
    tokens = (stage.longest or 1) * stage.batch_size
    return tokens * layers * size * (KEPT_HIDDEN * hidden + KEPT_INNER * inner)


def _measured(computed: StageEstimate, stage: StageBase, found: Sequence[ProbedStep]) -> StageEstimate:
    """The same with what steps took."""
    if not found:
        return computed
    seconds = {step.length: step.seconds for step in found}
    num_steps = stage.num_steps
    lengths = stage.lengths or (None,)
    peaks = [step.peak_bytes for step in found if step.peak_bytes is not None]
    return replace(
        computed,
        training_bytes=(TRAINING_BYTES - 4) * found[0].trained,
        peak_bytes=max(peaks, default=None),
        step_seconds=tuple(seconds[length] for length in lengths),
        seconds=sum(seconds[stage.length_at(step, num_steps)] for step in range(num_steps)),
    )
