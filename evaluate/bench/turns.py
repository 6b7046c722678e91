"""Models measured in turns, so that a slow spell of the machine hits all of them."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from ...attention_modules.counting import counting
from ...attention_modules.counts import AttentionCounts
from ...convert.surgery.swap import CORE, converted_modules
from ...formats import duration
from .cache_size import held_bytes
from .cases import Case, Piece, Role
from .clock import Stopwatch
from .memory import give_back, trim
from .models import ModelRunner


class Lane(ABC):
    """One model's side of a piece.

    Args:
        role: `"model"` or `"base"`.
    """

    # Turns that are not counted, since they fill what allocators, compilers and threads need.
    warm_up: ClassVar[int] = 1
    # Whether freed memory is returned to the system before each turn.
    tidy: ClassVar[bool] = True

    def __init__(self, role: Role) -> None:
        self.role = role
        self.seconds: list[float] = []
        self.peaks: list[int | None] = []
        self.cache: Any = None
        self.cache_bytes: int | None = None
        self.skipped: str | None = None
        self.attention: dict[str, Any] | None = None

    # Most lanes need nothing.
    def prepare(self) -> None:  # noqa: B027
        """Do what comes before the first turn and is not measured."""

    @abstractmethod
    def act(self) -> Any:
        """Do what is measured."""

    def counted(self) -> AbstractContextManager[None]:
        """Inside, `act` keeps what the attention does in `attention`."""
        return nullcontext()

    def settle(self, output: Any) -> int:
        """Take what `act` returned; returns bytes of the cache that were held during it."""
        return 0

    def let_go(self) -> None:
        """Free what the lane holds."""
        self.cache = None

    def case(self, piece: Piece) -> Case:
        """What was measured."""
        if self.skipped is not None:
            return Case.left_out(piece, self.role, self.skipped)
        known = [peak for peak in self.peaks if peak is not None]
        peak = max(known) if known else None
        sizes = {"peak_bytes": peak, "cache_bytes": self.cache_bytes}
        return Case.measured(piece, self.role, self.seconds, **sizes, attention=self.attention)


class ModelLane(Lane):
    """One that runs a model on a prompt `[batch, context]`."""

    def __init__(self, role: Role, runner: ModelRunner, prompt: torch.Tensor) -> None:
        super().__init__(role)
        self.runner, self.prompt = runner, prompt

    @contextmanager
    def counted(self) -> Iterator[None]:
        model = self.runner.model
        if not isinstance(model, PreTrainedModel) or not converted_modules(model):
            yield
            return
        with counting(model) as counter:
            yield
        layers = {name.removesuffix(f".{CORE}"): counts for name, counts in counter.by_module.items()}
        self.attention = AttentionCounts(self.prompt.shape[1], layers).to_dict()


class PrefillLane(ModelLane):
    """The whole prompt `[batch, context]` at once, into a new cache."""

    def act(self) -> Any:
        """Run the prompt."""
        return self.runner.forward(self.prompt)

    def settle(self, output: Any) -> int:
        """Count the cache and drop it."""
        cache = self.runner.cache_of(output)
        self.cache_bytes = None if cache is None else held_bytes(cache)
        return 0


class DecodeLane(ModelLane):
    """One token for each sequence of the batch, after a prompt `[batch, context]`; each turn goes one token further."""

    warm_up = 2
    tidy = False

    def __init__(self, role: Role, runner: ModelRunner, prompt: torch.Tensor) -> None:
        super().__init__(role, runner, prompt)
        self.token = prompt[:, -1:]

    def prepare(self) -> None:
        """Run the prompt."""
        output = self.runner.forward(self.prompt)
        self.cache = self.runner.cache_of(output)
        if self.cache is None:
            self.skipped = "the model returns no cache to continue from"
            return
        self.cache_bytes = held_bytes(self.cache)
        self.token = output.logits[:, -1:].argmax(-1)

    def act(self) -> Any:
        """Run one token."""
        return self.runner.forward(self.token, self.cache)

    def settle(self, output: Any) -> int:
        """Choose the next token."""
        self.cache = self.runner.cache_of(output)
        self.token = output.logits[:, -1:].argmax(-1)
        return held_bytes(self.cache)


class TrainingLane(Lane):
    """One training step on `[batch, context]`."""

    def __init__(self, role: Role, step: Callable[[torch.Tensor], object], ids: torch.Tensor) -> None:
        super().__init__(role)
        self.step, self.ids = step, ids

    def act(self) -> Any:
        """Run the step."""
        self.step(self.ids)


def take_turns(lanes: Sequence[Lane], watch: Stopwatch, *, repeats: int, limit: float) -> None:
    """Measure all lanes `repeats` times each, one after the other; out of memory leaves a lane out.

    Args:
        lanes: models of the same measure.
        watch: what measures.
        repeats: turns that count.
        limit: seconds that one turn may take; a lane whose warm-up takes longer is left out.
    """
    trim()
    try:
        for lane in lanes:
            _unless_memory_runs_out(lane, lane.prepare, watch)
        for turn in range(max((lane.warm_up for lane in lanes), default=0) + repeats):
            for lane in lanes:
                if lane.skipped is None:
                    _unless_memory_runs_out(lane, partial(_turn, lane, watch, turn - lane.warm_up, limit), watch)
    finally:
        for lane in lanes:
            lane.let_go()


def _turn(lane: Lane, watch: Stopwatch, number: int, limit: float) -> None:
    """A lane's turn; those with negative numbers are its warm-up."""
    with lane.counted() if number == -lane.warm_up else nullcontext():
        reading = watch.read(lane.act, tidy=lane.tidy)
    held = lane.settle(reading.output)
    if number >= 0:
        lane.seconds.append(reading.seconds)
        lane.peaks.append(None if reading.peak_bytes is None else reading.peak_bytes + held)
    elif number == -1 and reading.seconds > limit:
        lane.skipped = f"one run took {duration(reading.seconds)}, more than the {duration(limit)} allowed"


def _unless_memory_runs_out(lane: Lane, action: Callable[[], None], watch: Stopwatch) -> None:
    try:
        action()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        lane.skipped = f"out of memory when asking for {asked[1]}" if asked else "out of memory"
    # Only now, when the error no longer holds on to the tensors of the calls that it went through.
    if lane.skipped is not None:
        lane.let_go()
        give_back(watch.device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on the CPU torch has no type of its own for that."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return (
        re.search(r"out of memory|not enough memory|allocate memory|alloc_cpu", str(error), re.IGNORECASE) is not None
    )
