"""Gates on heads: softmax attention as the model has it, and a factor on what each head made of each token."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import NOTHING
from ..calls import layer_input
from ..counting import Places, current_counter
from ..geometry import Geometry
from ..softmax import SoftmaxAttention
from ..state import AttentionState
from ..tokens import Surroundings
from ..weights import Statistic
from .gathering import gathered_attention, gathering_pays


class Routing(NamedTuple):
    """What a router says of each token.

    Attributes:
        scores: `[batch, T, choices]`.
        places: `[batch, T, active]` int64, which of them are used; None = all.
    """

    scores: Tensor
    places: Tensor | None = None

    @classmethod
    def of(cls, scores: Tensor, active: int) -> "Routing":
        """The `active` highest scores of each token, of equal ones any."""
        if active == scores.shape[-1]:
            return cls(scores)
        known = scores.detach() if scores.requires_grad else scores
        return cls(scores, known.topk(active, -1).indices)

    @property
    def chosen(self) -> Tensor:
        """`[batch, T, choices]` bool."""
        if self.places is None:
            return torch.ones_like(self.scores, dtype=torch.bool)
        return torch.zeros_like(self.scores, dtype=torch.bool).scatter(-1, self.places, True)

    def shares(self) -> Tensor:
        """Softmax over the chosen scores, 0 for all others."""
        return self._among_all(self._used().softmax(-1))

    def factors(self) -> Tensor:
        """The same times the number of those chosen: exactly 1 where their scores are equal."""
        used = self._used()
        if used.shape[-1] == 1 and not torch.is_grad_enabled():
            # What one alone comes to, in fewer steps.
            return self._among_all(torch.ones_like(used))
        weights = (used - used.amax(-1, keepdim=True)).exp()
        # In this order, for 1 / n * n is not 1 for every n.
        return self._among_all(weights * used.shape[-1] / weights.sum(-1, keepdim=True))

    # A token at a time these are the smallest of operations, so their number is what they cost.
    def _used(self) -> Tensor:
        return self.scores if self.places is None else self.scores.gather(-1, self.places)

    def _among_all(self, used: Tensor) -> Tensor:
        if self.places is None:
            return used
        return torch.zeros_like(self.scores).scatter(-1, self.places, used)


class ChosenHeads(NamedTuple):
    """The heads that serve each token.

    Attributes:
        gates: `[batch, num_heads, T]`, the factors on them.
        mixed: `[batch, num_heads, T, value_dim]`, what their attention gives, 0 where a head does not serve; None where
            computing all of them takes no longer.
    """

    gates: Tensor
    mixed: Tensor | None


class HeadUse(NamedTuple):
    """What was observed of the units of a layer, heads or groups of them, over some tokens.

    Attributes:
        foretold: `[units, hidden]`, weights of the layer's input that foretell how much each unit contributes.
        moments: `[hidden, hidden]`, products of that input with itself, mean over tokens.
        contribution: `[units]`, how much each contributes, mean over tokens.
        first: `[units]`, share of the tokens for which it contributes more than every other.
    """

    foretold: Tensor
    moments: Tensor
    contribution: Tensor
    first: Tensor


class HeadGate(SoftmaxAttention):
    """Softmax attention with a gate on each head and token.

    In a model its own attention function does the mixing, with its own cache and kernels, and only the gates are
    computed here. Alone, the class attends by itself, so that it can be compared with others.
    """

    keeps_softmax = True

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        if geometry.hidden_size is None:
            return f"{cls.name!r} reads the layer's input, whose size is not known"
        return None

    @property
    def reads_hidden_states(self) -> bool:
        return True

    @property
    def observed_units(self) -> int | None:
        """How many units, heads or groups of them, are to be observed before a start; None if nothing is to be."""
        return None

    def start_from(self, use: HeadUse) -> None:
        """Settle what follows from what was observed; for gates that have `observed_units`.

        Args:
            use: what was observed of the units.
        """

    def refine(self, heads: Tensor) -> Tensor:
        """What follows the mixing of values, before the gates, for each head and token by itself.

        Args:
            heads: `[batch, num_heads, T, value_dim]`, fp32 or fp64.
        """
        return heads

    @abstractmethod
    def gates(self, query: Tensor, hidden_states: Tensor | None) -> Tensor:
        """The factor on each head's output; exactly 0 where a head is not used.

        Args:
            query: `[batch, num_heads, T, head_dim]`, fp32 or fp64.
            hidden_states: `[batch, T, hidden]`, the layer's input; None unless `reads_hidden_states`.

        Returns:
            `[batch, num_heads, T]`.
        """

    @abstractmethod
    def routing(self, query: Tensor, hidden_states: Tensor | None) -> Routing:
        """What the gates are made of; arguments as for `gates`."""

    @property
    @abstractmethod
    def tie(self) -> str | None:
        """Why training cannot start from these weights, None if it can: equal scores drop the same heads always."""

    def balance_loss(self, query: Tensor, hidden_states: Tensor | None, valid: Tensor | None = None) -> Tensor:
        """How unevenly tokens are routed: 1 where all choices are used and wanted equally, more where some are not.

        It is a function of its arguments alone, so it can be computed again, by any process and at any time.

        Args:
            query: `[batch, num_heads, T, head_dim]`.
            hidden_states: `[batch, T, hidden]`; None unless `reads_hidden_states`.
            valid: `[batch, T]` bool, True = real token; None when all are.

        Returns:
            a scalar: `choices * sum(share of all choices made * mean share of the scores)`.
        """
        with torch.autocast(query.device.type, enabled=False):
            routing = self.routing(*self._inputs(query, hidden_states, valid))
        scores = routing.scores
        keep = torch.ones_like(scores[..., 0], dtype=torch.bool) if valid is None else valid
        wanted, made = scores[keep].softmax(-1), routing.chosen[keep].to(scores.dtype)
        made = made / made.sum(-1, keepdim=True)
        return scores.shape[-1] * (made.mean(0) * wanted.mean(0)).sum()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        padding_mask: Tensor | None = None,
        state: AttentionState | None = None,
        hidden_states: Tensor | None = None,
        around: Surroundings = NOTHING,
        mixed: Tensor | None = None,
        gates: Tensor | None = None,
        seen: Tensor | None = None,
        held: int = 0,
    ) -> Tensor:
        """Attend, or act on what the model's own attention has mixed.

        Args:
            query: `[batch, num_heads, T, head_dim]`.
            key: as for every method.
            value: as for every method.
            scaling: as for every method.
            padding_mask: as for every method.
            state: as for every method.
            hidden_states: as for every method.
            around: as for every method.
            mixed: `[batch, num_heads, T, value_dim]`, the values as the model has mixed them; None to do it here.
            gates: `[batch, num_heads, T]`, as `chosen_heads` gave them; None to compute them here.
            seen: `[batch, T]` int64, tokens that each query saw in `mixed`, 0 for padding; for `counting`.
            held: bytes of the model's cache of this layer; likewise.
        """
        counter = current_counter()
        places = None
        if mixed is None:
            places = None if counter is None else counter.places(self, query, key, padding_mask, state)
            mixed = self._run(query, key, value, scaling, padding_mask, state, hidden_states, around, finish=False)
        elif counter is not None and seen is not None and counter.counts(self):
            places = Places(seen, seen, seen > 0)
        valid = None if padding_mask is None else padding_mask[:, -query.shape[2] :]
        if gates is None:
            gates = self._gates(query, hidden_states, valid)
        # Products with factors of exactly 1 change no bit, whatever the dtype.
        with torch.autocast(query.device.type, enabled=False):
            out = self.refine(mixed.to(gates.dtype)) * gates[..., None]
        if valid is not None:
            out = out.masked_fill(~valid[:, None, :, None], 0.0)
        if counter is not None and places is not None:
            counter.add(self, places, state, serving=gates != 0, held=held)
        return out.to(value.dtype)

    def chosen_heads(
        self, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, hidden_states: Tensor | None
    ) -> ChosenHeads | None:
        """Plain causal attention of the heads that serve each token; None where it never saves time to leave any out.

        Args:
            query: `[batch, num_heads, T, head_dim]`, none of which is padding.
            key: `[batch, num_kv_heads, S, head_dim]`.
            value: `[batch, num_kv_heads, S, value_dim]`.
            scaling: factor on query-key products.
            hidden_states: `[batch, T, hidden]`, the layer's input.
        """
        if not gathering_pays(query, key):
            return None
        gates = self._gates(query, hidden_states, None)
        return ChosenHeads(gates, gathered_attention(query, key, value, gates, scaling))

    def _gates(self, query: Tensor, hidden_states: Tensor | None, valid: Tensor | None) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            return self.gates(*self._inputs(query, hidden_states, valid))

    def _inputs(
        self, query: Tensor, hidden_states: Tensor | None, valid: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Query and layer's input as the maths wants them."""
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        batch, _, length, _ = query.shape
        if not self.reads_hidden_states:
            return query.to(dtype), None
        shape = batch, length, self.geometry.hidden_size
        return query.to(dtype), layer_input(self.name, hidden_states, shape, length, valid, dtype)

    def statistics(
        self,
        query: Tensor,
        key: Tensor,
        *,
        scaling: float,
        padding_mask: Tensor | None = None,
        hidden_states: Tensor | None = None,
    ) -> Mapping[str, Statistic]:
        """How often each head is used, and by how much it is multiplied on average."""
        valid = torch.ones_like(query[:, 0, :, 0], dtype=torch.bool) if padding_mask is None else padding_mask
        gates = self._gates(query, hidden_states, valid).transpose(1, 2)[valid]
        share = (gates != 0).to(gates.dtype).mean(0)
        used = Statistic("heads used", "share of the tokens that a head serves", "head", "percent", share)
        mean = Statistic("gate", "factor on a head's output, mean over tokens", "head", "number", gates.mean(0))
        return {used.name: used, mean.name: mean}
