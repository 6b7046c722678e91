"""Running a benchmark: pieces one after another, each journaled, then one document."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from ...errors import TrainingError
from ...formats import count
from ..engine.attention import count_tokens
from ..engine.journal import Journal
from ..engine.models import find_device
from ..engine.progress import Progress
from ..engine.results import describe_model, describe_setup, results_folder, write_results
from ..engine.schema import MeasuredModel, Setup
from .cases import BASE, DECODE, MAX_SECONDS, MODEL, TRANSFER, BenchSettings, Case, Piece, Role, pieces_of
from .clock import Clock, Stopwatch
from .crossover import crossovers
from .guards import refusal
from .memory import available_bytes, give_back
from .models import BenchedModel, ModelRunner, open_benched, ordinary_tokens, random_prompt
from .schema import BenchmarkFile
from .turns import DecodeLane, Lane, PrefillLane, TrainingLane, take_turns

logger = logging.getLogger(__name__)

JOURNAL = "bench.partial"
# Tokens on which a converted model has to show that its layers run their methods.
CHECKED = 64

TrainingStep = Callable[[torch.Tensor], object]


class TrainingCases(Protocol):
    """Makes training steps; healing knows how, which measuring does not know of."""

    def __call__(self, model: PreTrainedModel) -> TrainingStep:
        """Prepare a converted model, which is used for nothing else afterwards.

        Returns:
            one step on token ids `[batch, T]`; it leaves the weights as they are and no gradients behind.

        Raises:
            TrainingError: there is nothing to train.
        """


@dataclass(frozen=True)
class BenchResult:
    """The answer of `run_bench`.

    Attributes:
        results: what the file holds.
        path: the file.
    """

    results: BenchmarkFile
    path: Path

    @cached_property
    def document(self) -> dict[str, Any]:
        """What the file holds, as plain JSON values."""
        return self.results.plain()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self.document, "path": str(self.path)}


def run_bench(
    source: str,
    *,
    against: str | None = None,
    contexts: Sequence[int] = (512, 2048, 8192),
    batches: Sequence[int] = (1,),
    repeats: int = 5,
    decode_tokens: int = 32,
    dtype: str = "auto",
    device: str | None = None,
    training_contexts: Sequence[int] = (512, 2048),
    max_seconds: float = MAX_SECONDS,
    output: str | Path | None = None,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    training: TrainingCases | None = None,
    clock: Clock = time.perf_counter,
) -> BenchResult:
    """Measure a model's speed and memory by length and batch size, and those of another in turns with it.

    A prompt of random tokens goes through the model in one piece (`prefill`), then token by token (`decode`); a
    converted model can also be timed in training (`transfer`). Both models stay loaded and take turns. What does not
    fit the model's positions, the memory or the time is left out, with the reason. What an interrupted run measured is
    not measured again.

    Args:
        source: a local folder, Hub id or `.gguf` file of a causal language model, converted or not.
        against: the model to compare with.
        contexts: lengths of the prompt, in tokens.
        batches: sequences at once.
        repeats: how often each prefill and training step is timed, at least 1.
        decode_tokens: how many steps of decoding are timed, at least 1.
        dtype: one of `engine.models.DTYPES`; auto is that of each checkpoint.
        device: where to run; None means a GPU if there is one.
        training_contexts: lengths of the training sequences, in tokens; they have no effect without `training`.
        max_seconds: what one repeat may take, in seconds.
        output: folder for the results; None means as `results_folder` says.
        restart: forget what an interrupted run measured.
        trust_remote_code: whether models that bring their own code may run it.
        progress: called with (pieces done, pieces in all, what is being done).
        training: makes the training steps of a converted model; without it there are none.
        clock: what tells the time, in seconds.

    Raises:
        CheckpointError: a model cannot be read, or is no causal language model.
        DataError: a setting is none of those allowed.
        OutputError: the results cannot be written.
    """
    settings = BenchSettings.checked(
        contexts=contexts,
        batches=batches,
        repeats=repeats,
        decode_tokens=decode_tokens,
        dtype=dtype,
        training_contexts=training_contexts,
        max_seconds=max_seconds,
    )
    where = find_device(device)
    sources: dict[Role, str | None] = {BASE: against, MODEL: source}
    benched_models = [
        open_benched(role, name, dtype=dtype, trust_remote_code=trust_remote_code)
        for role, name in sources.items()
        if name is not None
    ]
    _warn_of_two_dtypes(benched_models)
    about = {benched.role: describe_model(benched.checkpoint, benched.dtype) for benched in benched_models}
    setup = describe_setup(where)
    folder = results_folder(source, output)
    with Journal(folder / JOURNAL) as journal:
        if restart:
            journal.remove()
        identity = _identity(settings, about, setup)
        bench = _Bench(settings, benched_models, Stopwatch(where, clock), training, journal, identity)
        cases = bench.run(progress)
        results = BenchmarkFile(
            model=about[MODEL],
            base=about.get(BASE),
            setup=setup,
            settings=settings,
            cases=cases,
            crossover=crossovers(cases),
        )
        path = write_results(folder, results)
        journal.remove()
    return BenchResult(results, path)


def _warn_of_two_dtypes(benched_models: Sequence[BenchedModel]) -> None:
    dtypes = [str(benched.dtype).removeprefix("torch.") for benched in benched_models]
    if len(set(dtypes)) > 1:
        logger.warning("The base runs in %s and the model in %s: give a dtype to compare like with like.", *dtypes)


def _identity(settings: BenchSettings, about: Mapping[Role, MeasuredModel], setup: Setup) -> str:
    """What must be the same for a finished piece to count: models, machine, versions and how it was measured."""
    facts = {
        "settings": {name: getattr(settings, name) for name in ("repeats", "decode_tokens", "max_seconds")},
        "models": {role: model.identity for role, model in about.items()},
        "setup": setup.model_dump(include={"device", "gpu", "cpu", "threads", "versions"}),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class _Bench:
    """A benchmark that is under way."""

    settings: BenchSettings
    benched_models: Sequence[BenchedModel]
    watch: Stopwatch
    training: TrainingCases | None
    journal: Journal
    identity: str
    cases: list[Case] = field(default_factory=list)
    step: TrainingStep | str | None = None

    def run(self, progress: Progress | None) -> list[Case]:
        """All cases, those of an interrupted run among them."""
        converted = self.benched_models[-1].checkpoint.is_converted
        pieces = pieces_of(self.settings, training=self.training is not None and converted)
        kept = sum(self._key(piece) in self.journal for piece in pieces)
        if kept:
            logger.warning("Going on after an interruption: %d of %d pieces are measured already.", kept, len(pieces))
        try:
            for done, piece in enumerate(pieces):
                if progress is not None:
                    progress(done, len(pieces), str(piece))
                self.cases += self._finished(piece)
            if progress is not None:
                progress(len(pieces), len(pieces), "done")
        finally:
            self._unload()
        return self.cases

    def _finished(self, piece: Piece) -> list[Case]:
        """The cases of a piece, from the journal or measured now."""
        key = self._key(piece)
        if key not in self.journal:
            self.journal.add(key, [case.to_dict() for case in self._measured(piece)])
        return [Case.from_dict(values) for values in self.journal[key]]

    def _key(self, piece: Piece) -> str:
        return f"{self.identity}/{piece.measure}/{piece.batch}/{piece.context}"

    def _measured(self, piece: Piece) -> list[Case]:
        roles = [item for item in self.benched_models if piece.measure != TRANSFER or item.role == MODEL]
        refused = {item.role: self._refusal(piece, item) for item in roles}
        able = [item for item in roles if refused[item.role] is None]
        measured: dict[str, Case] = {}
        if able:
            prompt, note = self._prompt(piece, able)
            with _mode(piece):
                measured = {case.role: case for case in self._turns(piece, able, prompt)}
            if note is not None:
                measured = {role: replace(case, note=case.note or note) for role, case in measured.items()}
        return [
            Case.left_out(piece, role, reason) if reason is not None else measured[role]
            for role, reason in refused.items()
        ]

    def _refusal(self, piece: Piece, benched: BenchedModel) -> str | None:
        available = available_bytes(self.watch.device)
        reason = refusal(
            piece,
            benched.role,
            self.cases,
            positions=benched.positions,
            limit=self.settings.max_seconds,
            available=available,
        )
        if reason is None and piece.measure == DECODE and benched.positions <= self._steps:
            reason = f"{self._steps} steps of decoding do not fit into {count(benched.positions)} positions"
        return reason

    @property
    def _steps(self) -> int:
        return DecodeLane.warm_up + self.settings.decode_tokens

    @cached_property
    def _tokens(self) -> torch.Tensor:
        return ordinary_tokens([item.checkpoint for item in self.benched_models])

    def _prompt(self, piece: Piece, able: Sequence[BenchedModel]) -> tuple[torch.Tensor, str | None]:
        """The tokens of a piece, the same for all models, and what is to be said about them."""
        length, note = piece.context, None
        if piece.measure == DECODE:
            room = min(item.positions for item in able) - self._steps
            if room < length:
                length = int(room)
                note = f"decoding began after {count(length)} tokens, so that it ends within the model's positions"
        return random_prompt(self._tokens, context=length, batch=piece.batch).to(self.watch.device), note

    def _turns(self, piece: Piece, able: Sequence[BenchedModel], prompt: torch.Tensor) -> list[Case]:
        repeats, limit = self.settings.repeats, self.settings.max_seconds
        lanes: list[Lane]
        if piece.measure == TRANSFER:
            step = self._training_step()
            if isinstance(step, str):
                return [Case.left_out(piece, MODEL, step)]
            lanes = [TrainingLane(MODEL, step, prompt)]
        else:
            self._load()
            kind: type[PrefillLane] | type[DecodeLane] = PrefillLane
            if piece.measure == DECODE:
                kind, repeats, limit = DecodeLane, self.settings.decode_tokens, limit / self.settings.decode_tokens
            lanes = [kind(item.role, ModelRunner(item.model), prompt) for item in able]
        take_turns(lanes, self.watch, repeats=repeats, limit=limit)
        return [lane.case(piece) for lane in lanes]

    def _load(self) -> None:
        for item in self.benched_models:
            if item.loaded is None:
                model = item.load(self.watch.device)
                if item.checkpoint.is_converted:
                    # What runs something else is not worth timing.
                    count_tokens(model, random_prompt(self._tokens, context=int(min(CHECKED, item.positions)), batch=1))

    def _unload(self) -> None:
        held = any(item.loaded is not None for item in self.benched_models)
        self.step = None
        for item in self.benched_models:
            item.loaded = None
        if held:
            give_back(self.watch.device)

    def _training_step(self) -> TrainingStep | str:
        """The training step, or why there is none."""
        if self.step is None:
            assert self.training is not None
            # Training turns the new attention to fp32 and wants tensors that no inference mode has touched.
            self._unload()
            try:
                self.step = self.training(self.benched_models[-1].load(self.watch.device))
            except TrainingError as error:
                self.step = str(error)
        return self.step


@contextmanager
def _mode(piece: Piece) -> Iterator[None]:
    with torch.inference_mode(piece.measure != TRANSFER):
        yield
