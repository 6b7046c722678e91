"""Learned choices of sparse attention: gates and indexes that foretell where a frozen layer looks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention_modules import Call, Tokens
from ..attention_modules.calls import new_tokens
from ..attention_modules.sparse.learned import LearnedChoice
from ..attention_modules.tokens import Surroundings
from ..attention_modules.window import MASKED
from ..convert.surgery.attention_function import AttentionCall, attention_hook
from ..errors import TrainingError
from ..recipes.stages.gate import GateStage
from .batches import Batch
from .head import run_layers
from .objective import Figures, Objective, ParameterGroup
from .teacher_map import pooled_attention
from .trainee import Trainee

# Query-key products of all heads that are held at a time: 8 MiB in fp32, which stay in the caches of a CPU.
MOST_PRODUCTS = 1 << 21
# So that a fraction of the queries can be drawn.
LEAST_STRIPS = 16


class ChoiceTraining(Objective):
    """KL(attention || choice) over the blocks before each query's own, local to each layer.

    The model runs once, with softmax attention, and without a graph. At each layer that chooses, its attention is
    pooled over blocks, a strip of queries at a time, and the backward pass of the choice runs at once. Softmax is that
    of the scaled products, without the soft caps or sinks of some models.

    Args:
        trainee: the converted model.
        stage: the recipe's stage.

    Raises:
        TrainingError: no converted layer learns to choose.

    Paper: https://arxiv.org/abs/2410.13276
    """

    def __init__(self, trainee: Trainee, stage: GateStage) -> None:
        self.trainee = trainee
        self.stage = stage
        self.cores = {name: core for name, core in trainee.cores().items() if isinstance(core, LearnedChoice)}
        if not self.cores:
            raise TrainingError(
                "The stage gate trains what chooses blocks or tokens, and no converted layer learns that: it is for "
                "the methods 'seer' and 'dsa'"
            )
        names = {f"{name}.attnconv.{key}": p for name, core in self.cores.items() for key, p in core.named_parameters()}
        self.group = ParameterGroup(names, stage.learning_rate)

    def parameter_groups(self) -> list[ParameterGroup]:
        """The parameters of choices."""
        return [self.group]

    def count(self, batch: Batch) -> int:
        """Real tokens."""
        return batch.num_tokens

    def backward(self, batch: Batch, total: int) -> Figures:
        """Run the model once; every layer that chooses learns on the way."""
        share = batch.num_tokens / total / len(self.cores)
        losses: list[Tensor] = []

        def learn(call: AttentionCall) -> Tensor:
            core = self.cores.get(call.name)
            if core is not None:
                with torch.enable_grad():
                    losses.append(self._learn(core, call, share))
            return call.teacher()

        self.trainee.model.eval()
        with torch.no_grad(), attention_hook(self.trainee.model, learn):
            run_layers(self.trainee.model, batch)
        return Figures(torch.stack(losses).sum())

    def _learn(self, core: LearnedChoice, call: AttentionCall, share: float) -> Tensor:
        """Add a layer's gradients; its part of the loss, a mean over rows of queries that have blocks before theirs."""
        calls = [exact_call(core, *row, call.scaling) for row in call.rows()]
        strips = [self._strips(core, one) for one in calls]
        weight = share / max(1, sum(len(strip) for own in strips for strip in own))
        loss = torch.zeros((), device=call.query.device)
        for one, own in zip(calls, strips, strict=True):
            rows, columns = core.stand_ins(one)
            leaves = [t.detach().requires_grad_() for t in (rows, columns)]
            for strip in own:
                part = weight * self._divergence(core, one, leaves, strip)
                part.backward()
                loss = loss + part.detach()
            if own:
                torch.autograd.backward([rows, columns], [leaf.grad for leaf in leaves])
        return loss

    def _strips(self, core: LearnedChoice, call: Call) -> list[range]:
        """The rows of queries to learn from, as many behind one another as are looked at together."""
        together = core.queries_together
        # Those before have no block before their own.
        first, last = core.slots.block // together, -(-call.length // together)
        of_row = call.query[:, :, 0, 0].numel() * call.length * together
        size = max(1, min(MOST_PRODUCTS // of_row, (last - first) // LEAST_STRIPS))
        strips = [range(start, min(start + size, last)) for start in range(first, last, size)]
        if self.stage.queries == 1:
            return strips
        chosen = torch.randperm(len(strips))[: max(1, round(self.stage.queries * len(strips)))]
        return [strips[number] for number in chosen.tolist()]

    def _divergence(self, core: LearnedChoice, call: Call, leaves: list[Tensor], strip: range) -> Tensor:
        """The sum over rows of KL(attention || choice), mean over KV heads."""
        block, together = core.slots.block, core.queries_together
        with torch.no_grad():
            wanted = pooled_attention(
                call.query,
                call.tokens.keys,
                scaling=call.scaling,
                block=block,
                together=together,
                rows=strip,
                pooling=self.stage.pooling,
            )
            own = torch.arange(strip.start, strip.stop, device=wanted.device) * together // block
            later = torch.arange(wanted.shape[-1], device=wanted.device) >= own[:, None]
            wanted = wanted.masked_fill(later, 0.0)
            wanted = wanted / wanted.sum(-1, keepdim=True).clamp_min(torch.finfo(wanted.dtype).tiny)
        rows, columns = leaves
        logits = core.logits(rows[:, :, strip.start : strip.stop], columns)
        guess = logits.masked_fill(later, MASKED).log_softmax(-1)
        return F.kl_div(guess, wanted, reduction="none").sum((-1, -2)).mean()


def exact_call(
    core: LearnedChoice, query: Tensor, key: Tensor, hidden: Tensor | None, around: Surroundings, scaling: float
) -> Call:
    """A sequence as the core sees it, in fp32, without gradients and without the values, which no choice looks at."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = query.detach().to(dtype), key.detach().to(dtype)
    tokens = new_tokens(core, Tokens(key, key[..., :0]), None, around)
    unrotated = around.unrotated[0] if core.reads_unrotated and around.unrotated is not None else None
    return Call(query, tokens, scaling, unrotated_query=unrotated)
