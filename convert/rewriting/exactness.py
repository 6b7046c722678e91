"""The check of a rewrite: before and after each step, cut to a few layers and words, loaded by transformers, compared.

Nothing is believed: the cut models are written by the writer that writes the result, and loaded by transformers alone.
On request nothing is cut, and what is compared is what the models make of a text.
"""

import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from typing_extensions import Self

from ...errors import PlanError
from ...files.foreign_errors import first_line
from ...files.json_files import write_json
from ...files.own_files import CONFIG_FILE
from .cut import Cut, choose_layers, cut_config, cut_tensors
from .plan import RewritePlan, State
from .steps import Step
from .writer import write_targets

logger = logging.getLogger(__name__)

BOUND = 2e-6
"""Largest difference between logits of two models that are the same, over the largest logit, in float32."""
TOKENS = 64
WINDOW = 16
"""What windows are cut to, so that a model that lost its own is seen to."""
WORDS = 1024


@dataclass(frozen=True)
class Exactness:
    """How far a rewritten model is from its source at the start.

    Attributes:
        promised: whether every step says that nothing changes.
        reasons: why those that do not say so change something, a clause each.
        difference: largest difference between the logits, in float32; None if it was not measured, or is no number.
        largest_logit: largest logit of the source, without its sign.
        layers: the layers that were compared, by their places in the model.
        text_tokens: tokens of the text on which whole models were compared; None where they were cut.
        unmeasured: why nothing was measured, or None.
        objection: what is not as promised, or None.
    """

    promised: bool
    reasons: tuple[str, ...] = ()
    difference: float | None = None
    largest_logit: float | None = None
    layers: tuple[int, ...] = ()
    text_tokens: int | None = None
    unmeasured: str | None = None
    objection: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "reasons": list(self.reasons), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """The same again from what `to_dict` gave."""
        plain: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in found.items()}
        return cls(**plain)

    @property
    def sentence(self) -> str:
        """The figure in words, without a full stop."""
        if self.unmeasured is not None:
            return f"how far the start is from the source was not measured: {self.unmeasured}"
        compared = f"layers {', '.join(map(str, self.layers))}"
        if self.text_tokens is not None:
            compared = f"all layers, on {self.text_tokens} tokens of text"
        figure = (
            f"logits differ from the source's by at most {_figure(self.difference)} of {_figure(self.largest_logit)} "
            f"(float32, {compared})"
        )
        if self.objection is not None:
            return f"{figure}, not as promised: {self.objection}"
        return f"{figure}, exact as promised" if self.promised else f"{figure}; {' and '.join(self.reasons)}"


def check_exactness(plan: RewritePlan, *, allow_inexact: bool = False, text: Tensor | None = None) -> Exactness:
    """Hold a planned rewrite to what its steps promise, before it is written.

    The logits of a step that promises to change nothing must stay what they were, and transformers must find a place
    for every tensor and a tensor for every place.

    Args:
        plan: the rewrite.
        allow_inexact: warn of what is not as promised instead of refusing it.
        text: `[tokens]` int64, a text on which whole models are compared; None compares cut ones.

    Raises:
        PlanError: something is not as promised.
    """
    reasons = tuple(dict.fromkeys(step.inexact for step in plan.steps if step.inexact is not None))
    unmeasured = _unmeasurable(plan)
    if unmeasured is None:
        try:
            return _checked(plan, _Trial.of(plan, text), reasons, allow_inexact)
        except _LoadError as error:
            unmeasured = str(error)
    found = Exactness(not reasons, reasons, unmeasured=unmeasured)
    if found.promised:
        logger.warning("%s", found.sentence)
    return found


@dataclass(frozen=True)
class _Trial:
    """What is compared: what is left of the models, and what they read."""

    cut: Cut
    text: Tensor | None

    @classmethod
    def of(cls, plan: RewritePlan, text: Tensor | None) -> Self:
        if text is None:
            return cls(Cut(choose_layers(plan), WORDS, WINDOW), None)
        states = plan.states[0], plan.states[-1]
        layers, words = (max(count or 0 for count in counts) for counts in zip(*map(_counts, states), strict=True))
        return cls(Cut(tuple(range(layers)), words, sys.maxsize), text)

    def tokens(self, words: int) -> Tensor:
        """`[batch, T]`, below `words` where the text does not matter."""
        if self.text is not None:
            return self.text[None]
        return (torch.arange(2 * TOKENS).view(2, TOKENS) * 7 + 3) % words


def _counts(state: State) -> tuple[int | None, int | None]:
    return state.num_layers, state.num_words


def _checked(plan: RewritePlan, trial: _Trial, reasons: tuple[str, ...], allow_inexact: bool) -> Exactness:
    logits, objection = _measure(plan, trial)
    if objection is not None and not allow_inexact:
        raise PlanError(f"{objection}: nothing was written; --allow-inexact writes it all the same")
    if objection is not None:
        logger.warning("%s", objection)
    found = _difference(logits[0], logits[-1]) if len(logits) == len(plan.states) else math.inf
    return Exactness(
        promised=not reasons,
        reasons=reasons,
        difference=found if math.isfinite(found) else None,
        largest_logit=_finite(logits[0].abs().max()),
        layers=trial.cut.layers,
        text_tokens=None if trial.text is None else len(trial.text),
        objection=objection,
    )


def _measure(plan: RewritePlan, trial: _Trial) -> tuple[list[Tensor], str | None]:
    """The logits of each state, up to the first that transformers cannot load, and what is not as promised.

    Raises:
        _LoadError: transformers cannot load the source, or the models are too large.
    """
    _check_room(plan, trial.cut)
    first, oddities = _logits(plan.states[0], trial)
    rounding = _rounding(plan.states[0], trial, first)
    logits, objection = [first], None
    for number, state in enumerate(plan.states[1:]):
        step, tensors = plan.steps[number], state.tensors
        for done in plan.steps[: number + 1]:
            tensors = done.compared(tensors)
        try:
            after, odd = _logits(replace(state, tensors=tensors), trial)
        except _LoadError as error:
            return logits, f"{step.summary}: transformers cannot load the result: {error}"
        if not odd <= oddities:
            names = sorted(odd - oddities)
            objection = objection or (
                f"{step.summary}: transformers finds other tensors than those of a {state.config.get('model_type')} "
                f"model, {names[0]} first (of {len(names)} in all)"
            )
        objection = objection or _objection(step, logits[-1], after, rounding)
        logits.append(after)
        oddities |= odd
    return logits, objection


def _rounding(state: State, trial: _Trial, logits: Tensor) -> float:
    """How far a whole model's logits are from what they are in float64; nothing where cut ones are compared.

    Layer upon layer adds to what rounding changes, so that two ways to compute the same differ by more than `BOUND`.
    """
    return 0.0 if trial.text is None else _difference(_logits(state, trial, torch.float64)[0], logits)


def _objection(step: Step, before: Tensor, after: Tensor, rounding: float) -> str | None:
    difference, largest = _difference(before, after), float(before.abs().max())
    # Each of the two is as far from what it would be.
    allowed = max(BOUND * largest, 2 * rounding)
    if step.inexact is not None or difference <= allowed:
        return None
    return (
        f"{step.summary}: this was to change nothing, and logits are {difference:.3g} off, of at most {largest:.3g}, "
        f"where rounding explains {allowed:.1g}"
    )


class _LoadError(Exception):
    """Why a cut model cannot be loaded or run."""


def _logits(state: State, trial: _Trial, dtype: torch.dtype = torch.float32) -> tuple[Tensor, set[str]]:
    """Logits of what is left of a model, and the names of tensors that did not fit.

    Raises:
        _LoadError: transformers cannot load or run it.
    """
    with TemporaryDirectory(prefix="attnconv-check-") as room:
        folder, cut = Path(room), trial.cut
        config = cut_config(state, cut)
        write_targets(cut_tensors(state, cut), folder, shard_bytes=1 << 62)
        write_json(folder / CONFIG_FILE, config)
        model_class = getattr(transformers, config["architectures"][0])
        tokens = trial.tokens(min(state.num_words or 1, cut.words))
        # Grouped products know no float64; older releases have no choice of experts.
        loops = dtype == torch.float64 and getattr(model_class, "_can_set_experts_implementation", bool)()
        settings = {"experts_implementation": "eager"} if loops else {}
        with _silent(), torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                model, info = model_class.from_pretrained(
                    folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **settings
                )
                logits: Tensor = model.eval()(tokens, use_cache=False).logits
            # Whatever the classes of transformers find wrong with settings and shapes, each in its own way.
            except Exception as error:
                raise _LoadError(first_line(error)) from error
    return logits, {_name_of(item) for found in info.values() for item in found}


def _name_of(item: object) -> str:
    return str(item[0]) if isinstance(item, tuple) else str(item)


def _unmeasurable(plan: RewritePlan) -> str | None:
    """Why a rewrite cannot be measured by this check, or None."""
    checkpoint = plan.checkpoint
    if checkpoint.config_dict.get("auto_map"):
        return "the model brings its own Python code"
    if plan.states[0].config.get("quantization_config"):
        return "the model's weights are quantised"
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    text = checkpoint.config.get_text_config()
    if checkpoint.architecture not in known or text is not checkpoint.config:
        return "it is no language model of text alone"
    if not all(state.num_layers and state.num_words for state in plan.states):
        return "the model does not say how many layers and words it has"
    return None


def _check_room(plan: RewritePlan, cut: Cut) -> None:
    largest = max(sum(tensor.numbers for tensor in cut_tensors(state, cut)) for state in plan.states)
    # The weights in float32, and as much for what they are read from and made of.
    needed, free = 8 * largest, int(psutil.virtual_memory().available)
    if needed > free:
        count = len(cut.layers)
        raise _LoadError(f"{count} layers of it take {needed >> 20} MiB of memory, and {free >> 20} MiB are free")


def _difference(before: Tensor, after: Tensor) -> float:
    words = min(before.shape[-1], after.shape[-1])
    return float((after[..., :words] - before[..., :words]).abs().max())


def _finite(number: Tensor) -> float | None:
    return float(number) if bool(number.isfinite()) else None


def _figure(number: float | None) -> str:
    return "no number" if number is None else f"{number:.3g}"


@contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers from telling of models that nobody asked for."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(logging.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
