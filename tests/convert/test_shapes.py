"""Equal parts of a model on the meta device run once."""

import torch
from torch import Tensor, nn

from attnconv.convert.planning.meta_results import remembered_shapes


class Counted(nn.Module):
    """Counts its runs, and on request what is watched."""

    def __init__(self, size: int, runs: list[str], *, watched: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, size, device="meta"))
        self.runs, self.watched = runs, watched

    def forward(self, x: Tensor) -> Tensor:
        """One product."""
        self.runs.append("watched" if self.watched else "run")
        return x @ self.weight


def run(*parts: nn.Module, runs: list[str]) -> torch.Size:
    model = nn.Sequential(*parts)
    with remembered_shapes(model, lambda: runs.count("watched")):
        out: Tensor = model(torch.empty(3, 4, device="meta"))
    assert not any("forward" in vars(part) for part in model.modules())
    return out.shape


def test_equal_modules_run_once() -> None:
    runs: list[str] = []
    assert run(*(Counted(4, runs) for _ in range(5)), runs=runs) == (3, 4)
    assert runs == ["run"]


def test_what_is_watched_runs_every_time() -> None:
    runs: list[str] = []
    run(*(Counted(4, runs, watched=True) for _ in range(3)), runs=runs)
    assert runs == ["watched"] * 3


def test_other_shapes_and_settings_are_other_modules() -> None:
    def pool(stride: int) -> nn.Module:
        return nn.AvgPool1d(2, stride=stride)

    assert run(nn.Linear(4, 4, device="meta"), nn.Linear(4, 6, device="meta"), runs=[]) == (3, 6)
    assert run(pool(1), pool(2), runs=[]) == (3, 1)
