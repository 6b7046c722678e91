"""The self-check: convert the packaged model here, and see that cache, padding and reloading leave its logits alone."""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from ..compat import cache_argument
from ..convert import convert_model, converted_modules
from ..convert.writing.executed import check_executed
from ..evaluate.engine.progress import Progress
from ..packaged.model import embedded_model_path, embedded_tokens

# One that carries a state and reads the layer's input, and one that forgets; the window is shorter than the text.
METHODS: Mapping[str, Mapping[str, Any]] = MappingProxyType({"gated_delta": {}, "sliding_window": {"window": 8}})
# Largest difference between two ways to the same logits, over the largest logit, in fp32.
TOLERANCE = 2e-4
PREFILL, DECODE = 10, 20
# Tokens of the row that is padded beside a row of `PREFILL + DECODE`.
SHORT = 23


@dataclass(frozen=True)
class Check:
    """One thing that must not change what a converted model says.

    Attributes:
        name: what was compared, such as `cache`.
        method: the attention method.
        device: where.
        difference: the largest difference over the largest logit; None if it did not come to that.
        problem: what is wrong, None if nothing is.
    """

    name: str
    method: str
    device: str
    difference: float | None
    problem: str | None


@dataclass(frozen=True)
class SelfCheck:
    """All checks, in order.

    Attributes:
        checks: one for each device, method and comparison.
        seconds: wall time of all.
    """

    checks: tuple[Check, ...]
    seconds: float

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that found something."""
        return tuple(check for check in self.checks if check.problem is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def run_self_check(
    devices: tuple[torch.device, ...] = (torch.device("cpu"),),
    *,
    progress: Progress | None = None,
) -> SelfCheck:
    """Convert the packaged model, save it, reload it, and compare its logits on several ways to them; takes seconds.

    Args:
        devices: where to compute, one after the other.
        progress: called with (checks done, checks in all, what is being done).

    Returns:
        every check, also those that failed: a check that cannot be carried out has failed.
    """
    began = time.monotonic()
    # The tensors of this model are so small that threads would spend their time waiting for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    jobs = [(device, method) for device in devices for method in METHODS]
    checks: list[Check] = []
    try:
        for device, method in jobs:
            if progress is not None:
                progress(len(checks), len(jobs) * (1 + len(_COMPARISONS)), f"checking {method} on {device}")
            checks += _check_method(device, method)
    finally:
        torch.set_num_threads(threads)
    return SelfCheck(tuple(checks), time.monotonic() - began)


def _check_method(device: torch.device, method: str) -> list[Check]:
    """All checks of one method on one device."""
    tokens = embedded_tokens("valid")[:2, : PREFILL + DECODE].to(device)
    models: list[PreTrainedModel] = []

    def reload() -> float:
        model, difference = _reloaded(method, tokens)
        models.append(model)
        return difference

    checks = [_carried_out("save and reload", method, device, reload)]
    for name, compare in _COMPARISONS.items():
        if not models:
            checks.append(Check(name, method, str(device), None, "there is no reloaded model to look at"))
            continue
        checks.append(_carried_out(name, method, device, lambda compare=compare: compare(models[0], tokens)))  # type: ignore[misc]
    return checks


def _carried_out(name: str, method: str, device: torch.device, compare: Callable[[], float]) -> Check:
    """A comparison's answer as a check; whatever it raises is what the user is to be told."""
    try:
        with torch.inference_mode():
            difference = compare()
    # Any library underneath may fail in a way of its own, and the other checks are wanted all the same.
    except Exception as error:  # noqa: BLE001
        reason = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
        return Check(name, method, str(device), None, f"{type(error).__name__}: {reason}")
    # A difference that is not a number is no small one.
    within = difference <= TOLERANCE
    problem = None if within else f"logits are {difference:.1e} of the largest one apart, more than {TOLERANCE:.0e}"
    return Check(name, method, str(device), difference, problem)


def _reloaded(method: str, tokens: Tensor) -> tuple[PreTrainedModel, float]:
    """A conversion as `from_pretrained` brings it back from disk, and how far it is from what was saved."""
    torch.manual_seed(0)
    model = convert_model(_load(embedded_model_path(), tokens.device), method, **METHODS[method])
    expected = model(tokens, use_cache=False).logits
    with tempfile.TemporaryDirectory(prefix="attnconv-doctor-") as folder:
        model.save_pretrained(folder)
        found = _load(Path(folder), tokens.device)
    wanted, converted = len(converted_modules(model)), len(converted_modules(found))
    if converted != wanted or not wanted:
        raise RuntimeError(f"{wanted} layers were converted, and {converted} came back")
    return found, _difference(found(tokens, use_cache=False).logits, expected)


def _load(folder: Path, device: torch.device) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return cast(PreTrainedModel, model.to(device).eval())


def _executed(model: PreTrainedModel, tokens: Tensor) -> float:
    """Whether each converted layer ran its method and nothing else; there is nothing in between."""
    check_executed(model, lambda: model(tokens[:1], use_cache=True))
    return 0.0


def _through_cache(model: PreTrainedModel, tokens: Tensor) -> float:
    """Ten tokens at once, then one by one, against all at once."""
    found = _step_by_step(model, tokens, PREFILL)
    return _difference(found, model(tokens, use_cache=False).logits)


def _greedy(model: Any, tokens: Tensor) -> float:
    """Greedy text with the cache and without; its tokens are equal or not."""
    options = {"max_new_tokens": DECODE, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = tokens[:1, :PREFILL]
    mask = torch.ones_like(prompt)
    texts = [model.generate(prompt, attention_mask=mask, use_cache=cache, **options) for cache in (True, False)]
    if not torch.equal(*texts):
        raise RuntimeError("greedy text with the cache is another than without")
    return 0.0


def _left_padded(model: PreTrainedModel, tokens: Tensor) -> float:
    """A short row padded on the left beside a long one, through the cache, against the short row alone."""
    padding = tokens.shape[1] - SHORT
    mask = torch.ones_like(tokens)
    mask[1, :padding] = 0
    batch = torch.cat([tokens[:1], torch.cat([torch.zeros_like(tokens[1:, :padding]), tokens[1:, :SHORT]], 1)])
    found = _step_by_step(model, batch, PREFILL, mask)
    alone = model(tokens[1:, :SHORT], use_cache=False).logits
    others = _difference(found[:1], model(tokens[:1], use_cache=False).logits)
    return max(_difference(found[1:, padding:], alone), others)


def _packed(model: PreTrainedModel, tokens: Tensor) -> float:
    """Two documents packed into one row, against each alone."""
    parts = tokens[:1, :SHORT], tokens[1:]
    positions = torch.cat([torch.arange(part.shape[1], device=tokens.device) for part in parts])[None]
    found = model(torch.cat(parts, 1), position_ids=positions, use_cache=False).logits
    return _difference(found, torch.cat([model(part, use_cache=False).logits for part in parts], 1))


def _step_by_step(model: PreTrainedModel, tokens: Tensor, prefill: int, mask: Tensor | None = None) -> Tensor:
    """Logits `[batch, T, vocabulary]` of `tokens` by a prefill, then token by token through a cache."""
    mask = torch.ones_like(tokens) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    name = cache_argument(model.forward)
    found, start = [], 0
    for end in range(prefill, tokens.shape[1] + 1):
        part = slice(start, end)
        outputs = model(
            input_ids=tokens[:, part],
            attention_mask=mask[:, :end],
            position_ids=positions[:, part],
            use_cache=True,
            **{name: cache},
        )
        found.append(outputs.logits)
        start = end
    return torch.cat(found, 1)


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


_COMPARISONS: Mapping[str, Callable[[PreTrainedModel, Tensor], float]] = MappingProxyType(
    {
        "executed path": _executed,
        "cache": _through_cache,
        "greedy text": _greedy,
        "left padding": _left_padded,
        "packed": _packed,
    }
)
