"""What heads contribute, observed and settled in closed form: routers that foretell it, and which heads matter most."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..attention_modules.heads.gate import HeadGate, HeadUse
from ..convert.surgery.attention_function import AttentionCall, attention_hook
from ..convert.surgery.head import evaluating
from ..errors import TrainingError
from ..recipes.stages.calibrate import CalibrateStage
from .batches import Batch
from .fit import Fit
from .head import run_layers
from .team import Team
from .trainee import Trainee


@dataclass
class Sums:
    """What the least squares of a layer need of the tokens seen so far.

    Attributes:
        inputs: `[hidden, hidden]` fp64, products of the layer's input with itself.
        products: `[hidden, units]` fp64, of its input with what each unit contributes.
        lengths: `[units]` fp64, of what each unit contributes.
        first: `[units]` fp64, tokens for which it contributes most.
        count: one number, tokens.
    """

    inputs: Tensor
    products: Tensor
    lengths: Tensor
    first: Tensor
    count: Tensor

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(ours + theirs for ours, theirs in zip(self.all, other.all, strict=True)))

    @property
    def all(self) -> list[Tensor]:
        """Every sum."""
        return [self.inputs, self.products, self.lengths, self.first, self.count]


class RouterFit(Fit):
    """Ridge regression of each unit's contribution to a layer's output on the layer's input.

    What a unit (a head, or the heads of a KV head) contributes of a token is the length of its part of the output
    projection's result. The model runs as it was before the conversion, so what is observed depends on nothing that
    is fitted, and nothing but sums is kept.

    Args:
        trainee: the converted model.
        stage: the recipe's stage.

    Raises:
        TrainingError: no converted layer has anything that could be settled.

    Paper: https://arxiv.org/abs/2410.11842
    """

    def __init__(self, trainee: Trainee, stage: CalibrateStage) -> None:
        self.trainee = trainee
        self.stage = stage
        self.cores = {
            name: core
            for name, core in trainee.cores().items()
            if isinstance(core, HeadGate) and core.observed_units is not None
        }
        if not self.cores:
            raise TrainingError(
                "The stage calibrate observes what heads contribute, and no converted layer has one of the methods "
                "that want to know: it is for 'moh' with router: linear, and for 'shrp'"
            )
        self.sums: dict[str, Sums] = {}

    @torch.no_grad()
    def observe(self, batch: Batch) -> None:
        """Add what some sequences show.

        Raises:
            TrainingError: a layer's heads do not go into an output projection as they are.
        """
        waiting: dict[int, AttentionCall] = {}
        seen: set[str] = set()

        def look(call: AttentionCall) -> Tensor:
            teacher = call.teacher()
            if call.name in self.cores:
                waiting[teacher.data_ptr()] = call
            return teacher

        def project(module: nn.Module, args: tuple[Any, ...]) -> None:
            call = waiting.pop(args[0].data_ptr(), None) if args and isinstance(args[0], Tensor) else None
            if call is not None:
                seen.add(call.name)
                self._add(call, args[0], module)

        model = self.trainee.model
        with evaluating(model), attention_hook(model, look), _before_projections(model, project):
            run_layers(model, batch)
        missed = sorted(self.cores.keys() - seen)
        if missed:
            raise TrainingError(
                f"The stage calibrate found no output projection behind {missed[0]} and {len(missed) - 1} more: its "
                "heads go through something else first, so leave the stage out"
            )

    def _add(self, call: AttentionCall, heads: Tensor, projection: nn.Module) -> None:
        units, weight = self.cores[call.name].observed_units, projection.weight
        assert isinstance(weight, Tensor)
        assert units is not None
        assert call.hidden_states is not None
        matrix = (weight.T if isinstance(projection, Conv1D) else weight).float()
        valid = slice(None) if call.padding_mask is None else call.padding_mask.flatten()
        hidden = call.hidden_states.flatten(0, 1)[valid].float()
        # `[tokens, units, width]`, and what each unit's part of the projection does to lengths.
        parts = heads.flatten(0, 1).flatten(1)[valid].float().unflatten(1, (units, -1))
        columns = matrix.unflatten(1, (units, -1)).transpose(0, 1)
        gram = columns.transpose(1, 2) @ columns
        squares = torch.einsum("tuw,uwv,tuv->tu", parts, gram, parts)
        lengths = squares.clamp_min(0).sqrt()
        first = torch.bincount(lengths.argmax(-1), minlength=units).double()
        count = torch.tensor(float(len(hidden)), dtype=torch.float64, device=hidden.device)
        products = (hidden.T @ hidden).double(), (hidden.T @ lengths).double()
        found = Sums(*products, lengths.double().sum(0), first, count)
        before = self.sums.get(call.name)
        self.sums[call.name] = found if before is None else before + found

    @torch.no_grad()
    def settle(self, team: Team) -> None:
        """Let the layers' methods start from what was observed.

        Args:
            team: the processes that have each observed a part.
        """
        for name, core in self.cores.items():
            sums = self.sums[name]
            team.add_up(sums.all)
            ridge = self.stage.ridge * sums.inputs.diagonal().mean()
            system = sums.inputs + ridge * torch.eye(len(sums.inputs), dtype=torch.float64, device=sums.inputs.device)
            weights = torch.linalg.solve(system, sums.products).T
            means = (total / sums.count for total in (sums.inputs, sums.lengths, sums.first))
            core.start_from(HeadUse(weights, *means))


@contextmanager
def _before_projections(model: nn.Module, look: Any) -> Iterator[None]:
    """Inside, `look(module, args)` is called before every module with a matrix of its own."""
    handles = [
        module.register_forward_pre_hook(look)
        for module in model.modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim == 2
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
