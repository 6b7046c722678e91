"""What a matrix of attention weights is like, as free functions; each gives a number for every head.

Weights are `[..., T, S]`, the weight of each of S keys for each of T queries. Queries stand at the right end of the
keys: query `t` sits at position `S - T + t`. Rows need not add up to 1; only their proportions count.
"""

import torch
from torch import Tensor

# The first tokens, on which heads park the attention that they have no use for: four, as in StreamingLLM,
# https://arxiv.org/abs/2309.17453.
NUM_SINKS = 4
# Tokens by which a centre of attention may seem to move back through rounding alone.
ROUNDING = 1e-3


def normalised(weights: Tensor) -> Tensor:
    """Rows that add up to 1, in at least fp32; a row of zeros stays one."""
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def offsets(weights: Tensor) -> Tensor:
    """`[T, S]` int64: how many tokens each key stands before each query; negative for keys ahead."""
    return _positions(weights)[:, None] - torch.arange(weights.shape[-1], device=weights.device)


def mean_distance(weights: Tensor) -> Tensor:
    """How many tokens away a head looks on average, in either direction: `[...]`."""
    return (normalised(weights) * offsets(weights).abs()).sum(-1).mean(-1)


def mean_distances(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same by direction: how far behind and how far ahead, each over the mass on that side; 0 where none is."""
    weights, gap = normalised(weights), offsets(weights)
    found = []
    for side in (gap >= 0, gap < 0):
        mass = (weights * side).sum((-1, -2))
        total = (weights * side * gap.abs()).sum((-1, -2))
        found.append(torch.where(mass > 0, total / mass.clamp_min(torch.finfo(mass.dtype).tiny), 0.0))
    return found[0], found[1]


def mass_ahead(weights: Tensor) -> Tensor:
    """Share of the mass on keys after the query: `[...]`; zero for causal attention."""
    return (normalised(weights) * (offsets(weights) < 0)).sum(-1).mean(-1)


def covering_distance(weights: Tensor, share: float = 0.9, *, num_sinks: int = 0) -> Tensor:
    """The smallest distance within which a share of the mass lies, over all queries together: `[...]`, in tokens.

    Args:
        weights: `[..., T, S]`.
        share: in (0, 1].
        num_sinks: so many first keys count as covered wherever they stand.
    """
    weights, gap = normalised(weights), offsets(weights).abs()
    counted = weights.clone()
    counted[..., :num_sinks] = 0
    by_distance = weights.new_zeros(*weights.shape[:-2], weights.shape[-1])
    by_distance.index_add_(-1, gap.flatten(), counted.flatten(-2))
    wanted = share * weights.sum((-1, -2)) - (weights - counted).sum((-1, -2))
    # A hair less, so that rounding in the sum does not ask for the last token.
    short = by_distance.cumsum(-1) < wanted[..., None] * (1 - 1e-6)
    return short.sum(-1).clamp_max(weights.shape[-1] - 1).to(weights.dtype)


def entropy(weights: Tensor) -> Tensor:
    """Entropy of a query's weights in nats, mean over queries: `[...]`."""
    return _entropies(weights).mean(-1)


def relative_entropy(weights: Tensor, *, causal: bool) -> Tensor:
    """Entropy over its largest value, the logarithm of how many keys a query may see: `[...]` in [0, 1].

    Queries that see one key only do not count.
    """
    position = _positions(weights)
    visible = position + 1 if causal else torch.full_like(position, weights.shape[-1])
    several = visible > 1
    return (_entropies(weights)[..., several] / visible[several].log()).mean(-1)


def _entropies(weights: Tensor) -> Tensor:
    surprise: Tensor = torch.special.entr(normalised(weights))
    return surprise.sum(-1)


def sink_mass(weights: Tensor, num_sinks: int = NUM_SINKS) -> Tensor:
    """Share of the mass on the first keys, over the queries that stand behind them: `[...]`."""
    behind = _positions(weights) >= num_sinks
    return normalised(weights)[..., behind, :num_sinks].sum(-1).mean(-1)


def local_mass(weights: Tensor, window: int) -> Tensor:
    """Share of the mass on the last `window` keys, the query's own included, or as many on either side: `[...]`."""
    return (normalised(weights) * (offsets(weights).abs() < window)).sum(-1).mean(-1)


def streaming_mass(weights: Tensor, window: int, num_sinks: int = NUM_SINKS) -> Tensor:
    """Share of the mass on the first keys and the last `window` ones together: `[...]`."""
    seen = offsets(weights).abs() < window
    seen[:, :num_sinks] = True
    return (normalised(weights) * seen).sum(-1).mean(-1)


def monotonicity(weights: Tensor) -> Tensor:
    """Share of the steps from one query to the next at which the mean attended position does not move back: `[...]`.

    A head that reads along goes forward at every step, one that looks things up jumps. This is the measure (there in
    percent of target positions) of Rios et al. 2021, https://arxiv.org/abs/2104.03945.
    """
    position = torch.arange(weights.shape[-1], device=weights.device, dtype=torch.float64)
    centre = (normalised(weights).double() * position).sum(-1)
    return (centre.diff(dim=-1) >= -ROUNDING).double().mean(-1)


def induction_score(weights: Tensor, period: int) -> Tensor:
    """Mass on the token that followed a token's previous occurrence, in random tokens that come twice: `[...]`.

    It is the prefix matching score of Olsson et al. 2022, https://arxiv.org/abs/2209.11895; heads that copy what came
    next last time have most of their mass there, and a head that does not care has 1 / S.

    Args:
        weights: `[..., S, S]` for tokens whose last `2 * period` are the same `period` tokens twice, no token of which
            occurs a second time within them.
        period: tokens that are repeated.
    """
    # The key that stands `period - 1` before the query, for the queries of the second time.
    return normalised(weights).diagonal(1 - period, -2, -1)[..., -period:].mean(-1)


def _positions(weights: Tensor) -> Tensor:
    length, num_keys = weights.shape[-2:]
    return torch.arange(num_keys - length, num_keys, device=weights.device)
