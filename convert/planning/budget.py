"""Which method each unit of a model gets so that the least is lost within a budget: costs, and the choice by `milp`."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ...attention_modules.geometry import Geometry
from ...attention_modules.registry import create
from ...errors import PlanError

Kind = Literal["kv_bytes", "flops"]
KINDS: tuple[Kind, ...] = ("kv_bytes", "flops")
BUDGET = re.compile(r"(\w+)\s*=\s*(\d+(?:\.\d+)?)\s*%")


@dataclass(frozen=True)
class Budget:
    """What a plan may cost.

    Attributes:
        kind: `kv_bytes`, bytes of keys, values and states, or `flops`, products of attention for the last token.
        share: of what the model itself costs, in (0, 1].
    """

    kind: Kind
    share: float

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read `kv_bytes=25%`.

        Raises:
            PlanError: it is not of this form.
        """
        found = BUDGET.fullmatch(text.strip())
        if found is None or found[1] not in KINDS or not 0 < float(found[2]) <= 100:
            raise PlanError(f"a budget is kv_bytes=25% or flops=25%, above 0% and up to 100%, got {text!r}")
        return cls("kv_bytes" if found[1] == "kv_bytes" else "flops", float(found[2]) / 100)

    def __str__(self) -> str:
        return f"{self.kind}={100 * self.share:.10g}%"


@dataclass(frozen=True)
class Choice:
    """A method that a unit may get.

    Attributes:
        method: a registered method.
        options: its options, all of them or those that differ from the defaults.
    """

    method: str
    options: dict[str, Any]


def cost_of(kind: Kind, choice: Choice, geometry: Geometry, length: int, dtype: torch.dtype) -> int:
    """What a unit costs with a method.

    Args:
        kind: bytes or products.
        choice: the method.
        geometry: heads of the unit and their sizes.
        length: tokens of the text, at least 1.
        dtype: of keys and values.

    Returns:
        bytes of one sequence, or multiply-adds of its last token.
    """
    with torch.device("meta"):
        core = create(choice.method, geometry, **choice.options)
    if kind == "kv_bytes":
        return core.state_bytes(1, length, dtype)
    rank = torch.tensor([[length]])
    attended = int(core.tokens_attended(rank, rank))
    products = attended * geometry.num_heads * (geometry.head_dim + geometry.value_dim)
    return products + (core.state_multiply_adds() if attended < length else 0)


def choose(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: Budget, whole: float
) -> list[int]:
    """One choice for each unit, with the least loss that fits.

    Args:
        costs: of each unit, one for each of its choices.
        losses: likewise; what several units lose is taken for the sum.
        budget: what all may cost together.
        whole: what the model itself costs.

    Returns:
        the number of each unit's choice.

    Raises:
        PlanError: even the cheapest choices cost more.
    """
    least, most = sum(min(row) for row in costs), budget.share * whole
    if least > most:
        # Rounded up, so that what is said to be the least can be asked for.
        percents = math.ceil(1000 * least / whole) / 10
        raise PlanError(
            f"the budget of {budget} cannot be met: with the cheapest choice everywhere it is {percents}%; give a "
            "larger budget, a smaller window, or count at a greater length"
        )
    rows = [unit for unit, row in enumerate(costs) for _ in row]
    flat = np.array([cost for row in costs for cost in row], dtype=float)
    # Solvers want numbers of about the same size.
    scale = flat.max()
    weights = np.array([loss for row in losses for loss in row])
    weights = weights / max(weights.max(), 1e-12)
    units = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(len(costs), len(rows)))
    found = milp(
        weights,
        integrality=np.ones(len(rows)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(units, 1, 1), LinearConstraint(flat[None] / scale, 0, most / scale)],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise PlanError(f"no choice within the budget was found: {found.message}")
    taken = found.x > 0.5
    starts = np.cumsum([0, *(len(row) for row in costs)])
    return [int(np.argmax(taken[start:stop])) for start, stop in pairwise(starts)]
