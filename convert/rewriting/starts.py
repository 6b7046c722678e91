"""What new experts start as: copies, copies with some neurons drawn anew, or copies with noise."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .tensors import TORCH_TYPES, Target, made

Matrices = tuple[Target, Target, Target]
"""Of one feed-forward: gate and up of shape `[width, hidden]`, down of shape `[hidden, width]`."""


def generator(seed: int, name: str) -> torch.Generator:
    """Random numbers for one thing, the same whatever else is drawn before."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Copies:
    """Every expert is the feed-forward that it is made of."""

    @property
    def inexact(self) -> str | None:
        """Why the model does not start as the dense one, or None."""
        return None

    def start(self, matrices: Matrices, expert: str) -> Matrices:
        """The matrices of one expert.

        Args:
            matrices: those of the feed-forward, or of its part, that the expert is made of.
            expert: a name of its own, which decides what is drawn.
        """
        return matrices


@dataclass(frozen=True)
class Drop(Copies):
    """Drop-upcycling: some neurons of each expert are drawn anew, the same ones in all three matrices.

    What is drawn has the mean and the deviation that these neurons had in the matrix (https://arxiv.org/abs/2502.19261).

    Attributes:
        ratio: share of the neurons, in (0, 1].
        seed: what all is drawn from.
    """

    ratio: float
    seed: int

    @property
    def inexact(self) -> str | None:
        return f"{self.ratio:.0%} of each expert's neurons drawn anew"

    def start(self, matrices: Matrices, expert: str) -> Matrices:
        width = matrices[0].shape[0]
        order = torch.randperm(width, generator=generator(self.seed, f"{expert} neurons"))
        chosen = order[: max(1, round(self.ratio * width))]
        gate, up, down = (
            _changed(matrix, self._redrawn(chosen, axis, f"{expert} {place}"))
            for place, (matrix, axis) in enumerate(zip(matrices, (0, 0, 1), strict=True))
        )
        return gate, up, down

    def _redrawn(self, chosen: Tensor, axis: int, name: str) -> Callable[[Tensor], Tensor]:
        def redraw(matrix: Tensor) -> Tensor:
            old = matrix.index_select(axis, chosen).float()
            drawn = torch.randn(old.shape, generator=generator(self.seed, name)) * old.std(correction=0) + old.mean()
            return matrix.index_copy(axis, chosen, drawn.to(matrix.dtype))

        return redraw


@dataclass(frozen=True)
class Noise(Copies):
    """Every weight of every expert is off by a random number.

    Attributes:
        scale: deviation of the noise over that of the matrix, above 0.
        seed: what it is drawn from.
    """

    scale: float
    seed: int

    @property
    def inexact(self) -> str | None:
        return f"noise of {self.scale:g} times their deviation in the experts' weights"

    def start(self, matrices: Matrices, expert: str) -> Matrices:
        gate, up, down = (_changed(matrix, self._noisy(f"{expert} {place}")) for place, matrix in enumerate(matrices))
        return gate, up, down

    def _noisy(self, name: str) -> Callable[[Tensor], Tensor]:
        def add(matrix: Tensor) -> Tensor:
            whole = matrix.float()
            noise = torch.randn(whole.shape, generator=generator(self.seed, name))
            return (whole + noise * (self.scale * whole.std())).to(matrix.dtype)

        return add


def _changed(matrix: Target, change: Callable[[Tensor], Tensor]) -> Target:
    return made(matrix.name, matrix.shape, TORCH_TYPES[matrix.dtype], (matrix,), change)


def random_rows(shape: tuple[int, int], group: int, *, deviation: float, seed: int, name: str) -> Tensor:
    """Rows of a router, equal within each group.

    Args:
        shape: how many, and how many numbers each has.
        group: how many that follow each other are equal.
        deviation: standard deviation of the numbers.
        seed: what they are drawn from.
        name: of the router.
    """
    drawn = torch.randn((shape[0] // group, shape[1]), generator=generator(seed, name)) * deviation
    return drawn.repeat_interleave(group, 0)
