"""Indexes fitted in closed form: the few directions in which products of queries and keys differ most."""

import torch
from torch import Tensor

from ..attention_modules.sparse.presets.dsa import DeepSeekSparseAttention
from ..convert.surgery.attention_function import AttentionCall, attention_hook
from ..convert.surgery.head import evaluating
from ..recipes.stages.calibrate import CalibrateStage
from .batches import Batch
from .fit import Fit
from .head import run_layers
from .team import Team
from .trainee import Trainee


def indexed_layers(trainee: Trainee) -> dict[str, DeepSeekSparseAttention]:
    """The converted layers that choose by an index, by the names of the modules they serve."""
    return {name: core for name, core in trainee.cores().items() if isinstance(core, DeepSeekSparseAttention)}


class IndexFit(Fit):
    """The `q^T W_q W_k^T k` of low rank that is nearest to `q^T k` in the mean over all queries and keys of a KV head.

    With second moments `C_q`, `C_k` and the largest singular values of `C_q^(1/2) C_k^(1/2) = U S V^T` that is
    `W_q = C_q^(-1/2) U S^(1/2)`, `W_k = C_k^(-1/2) V S^(1/2)`. The model runs as it was before the conversion, and
    nothing but sums is kept.

    Args:
        trainee: the converted model.
        stage: the recipe's stage.
    """

    def __init__(self, trainee: Trainee, stage: CalibrateStage) -> None:
        self.trainee = trainee
        self.stage = stage
        self.cores = indexed_layers(trainee)
        # `[KV, D, D]` fp64 of queries, and of keys.
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def observe(self, batch: Batch) -> None:
        def look(call: AttentionCall) -> Tensor:
            if call.name in self.cores:
                self._add(call)
            return call.teacher()

        with evaluating(self.trainee.model), attention_hook(self.trainee.model, look):
            run_layers(self.trainee.model, batch)

    def _add(self, call: AttentionCall) -> None:
        heads = call.key.shape[1]
        found = []
        for tensor in (call.query, call.key):
            vectors = tensor.float()
            if call.padding_mask is not None:
                vectors = vectors.masked_fill(~call.padding_mask[:, None, :, None], 0.0)
            of_head = vectors.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 3)
            found.append((of_head.transpose(1, 2) @ of_head).double())
        before = self.sums.get(call.name)
        query, key = found if before is None else (before[0] + found[0], before[1] + found[1])
        self.sums[call.name] = query, key

    @torch.no_grad()
    def settle(self, team: Team) -> None:
        for name, core in self.cores.items():
            sums = self.sums[name]
            team.add_up([*sums])
            (query, query_inverse), (key, key_inverse) = (_roots(s, self.stage.ridge) for s in sums)
            left, values, right = torch.linalg.svd(query @ key)
            scale = values[:, None, : core.options.index_dim].sqrt()
            rank = scale.shape[-1]
            core.start_from(
                query_inverse @ left[..., :rank] * scale, key_inverse @ right.transpose(1, 2)[..., :rank] * scale
            )


def _roots(sums: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Square roots of matrices `[KV, D, D]` with a ridge, brought to a mean square of 1, and their inverses."""
    mean = sums.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    values, vectors = torch.linalg.eigh(sums / mean + ridge * torch.eye(sums.shape[-1], device=sums.device))
    root = values.clamp_min(ridge).sqrt()[:, None]
    return vectors * root @ vectors.transpose(1, 2), vectors / root @ vectors.transpose(1, 2)
