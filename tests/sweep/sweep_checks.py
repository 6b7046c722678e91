"""Convert a tiny model of any type, and check whatever must hold for a converted model."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from sweep_models import PADDING, auto_classes, build, outputs, working_inputs
from torch import Tensor
from transformers import PreTrainedModel

from attnconv.compat import cache_of
from attnconv.convert import apply_plan, converted_modules, make_plan, probe
from attnconv.errors import AttnConvError
from attnconv.recipes import AttentionRule

WINDOW = 3
# Largest difference, relative to the largest entry, between two ways of computing the same thing in fp32.
TOLERANCE = 1e-4
# A converted model that differs by less than this from the dense one may as well not be converted.
EFFECT = 1e-4
PARTS: dict[str, Any] = {"all": "all", "last": {"last": 1}}
NEW_TOKENS = 5

Outputs = dict[str, Tensor]


class CheckError(Exception):
    """A converted model does not do what it must."""


@dataclass(frozen=True)
class Verdict:
    """What became of one model type.

    Attributes:
        status: `ok`, `refused` (we say why), `unbuildable` (transformers cannot build or run it), or `failed`.
        reason: one sentence, empty for `ok`.
    """

    status: str
    reason: str = ""

    def to_dict(self) -> dict[str, str]:
        return {name: value for name, value in asdict(self).items() if value}


def examine(mapping: str, model_type: str, folder: Path) -> Verdict:
    """Build, convert and check one type; both conversions are saved under `folder` for a later reload."""
    try:
        model = build(mapping, model_type)
        inputs, dense = working_inputs(model)
    # Whatever transformers raises.
    except Exception as error:  # noqa: BLE001
        return Verdict("unbuildable", sentence(error))
    for part, layers in PARTS.items():
        try:
            converted = convert(build(mapping, model_type), layers)
            _check(converted, model, inputs, dense)
            _save(converted, inputs, folder / f"{mapping}.{model_type}.{part}", auto_classes(mapping)[model_type])
        except AttnConvError as error:
            return Verdict("refused", sentence(error))
        # Reported as the bug that it is.
        except Exception as error:  # noqa: BLE001
            return Verdict("failed", f"{part}: {sentence(error)}")
    return Verdict("ok")


def convert(model: PreTrainedModel, layers: Any, seed: int = 2) -> PreTrainedModel:
    """Swap attention, and move the new parameters away from their start, so that each of them matters."""
    rule = AttentionRule(layers=layers, method="lolcats", options={"window": WINDOW})
    apply_plan(model, make_plan([rule], probe(model.config, type(model)), allow_lossy=True))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in converted_modules(model).values():
            for parameter in module.attnconv.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def _check(model: PreTrainedModel, dense_model: PreTrainedModel, inputs: Outputs, dense: Outputs) -> None:
    found = outputs(model, inputs)
    if any(not value.isfinite().all() for value in found.values()):
        raise CheckError("outputs are not finite")
    effect = max(difference(dense[name], found[name]) for name in found if name in dense)
    if effect < EFFECT:
        raise CheckError(f"outputs are those of the dense model (they differ by {effect:.0e})")
    if "attention_mask" in inputs:
        _must_hold(_padding_matters, model, dense_model, inputs, "the content of padding changes outputs by {:.0e}")
        _must_hold(_company_matters, model, dense_model, inputs, "a padded row differs from the row alone by {:.0e}")
    if model.can_generate():
        _must_hold(_cache_matters, model, dense_model, inputs, "generation with and without cache differs by {:.0e}")


def _must_hold(
    error_of: Callable[[PreTrainedModel, Outputs], float],
    model: PreTrainedModel,
    dense_model: PreTrainedModel,
    inputs: Outputs,
    message: str,
) -> None:
    """Raise if the converted model breaks a rule that the dense model keeps.

    Some models break rules by themselves, or need more than a batch to generate; no attention can mend that.
    """
    found = _attempt(error_of, model, inputs)
    if isinstance(found, float) and found <= TOLERANCE:
        return
    usual = _attempt(error_of, dense_model, inputs)
    if isinstance(usual, Exception) or not usual <= TOLERANCE:
        return
    raise found if isinstance(found, Exception) else CheckError(message.format(found))


def _attempt(
    error_of: Callable[[PreTrainedModel, Outputs], float], model: PreTrainedModel, inputs: Outputs
) -> float | Exception:
    try:
        return error_of(model, inputs)
    # Raised again if it is the conversion that made the difference.
    except Exception as error:  # noqa: BLE001
        return error


def _padding_matters(model: PreTrainedModel, inputs: Outputs) -> float:
    """What other tokens under the padding of row 0 change."""
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, :PADDING] += 1
    before, after = outputs(model, inputs), outputs(model, changed)
    length = inputs["input_ids"].shape[1]
    errors = []
    for name, value in before.items():
        # Outputs at padding itself may be anything; a decoder's outputs are not the encoder's tokens.
        by_token = value.ndim > 1 and value.shape[1] == length and "decoder_input_ids" not in inputs
        if "encoder" in name:
            continue
        first = value[:1, PADDING:] if by_token else value[:1]
        errors.append(difference(first, after[name][:1, PADDING:] if by_token else after[name][:1]))
        errors.append(difference(value[1:], after[name][1:]))
    return max(errors)


def _company_matters(model: PreTrainedModel, inputs: Outputs) -> float:
    """The padded row 0 in its batch against the same row alone."""
    if set(inputs) != {"input_ids", "attention_mask"}:
        return 0.0
    alone = {name: value[:1, PADDING:] for name, value in inputs.items()}
    together, single = outputs(model, inputs), outputs(model, alone)
    length = inputs["input_ids"].shape[1]
    names = [name for name, value in together.items() if value.ndim == 3 and value.shape[1] == length]
    return max((difference(together[name][:1, PADDING:], single[name]) for name in names), default=0.0)


def _cache_matters(model: PreTrainedModel, inputs: Outputs) -> float:
    """Generation from states against generation that computes everything again for every token."""
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    options: dict[str, Any] = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    plain = model.generate(**given, use_cache=False, **options)
    with _watching_states(model) as lengths:
        cached = model.generate(**given, use_cache=True, **options)
    idle = [name for name, seen in lengths.items() if 1 not in seen]
    keeps_cache = cache_of(cached) is not None and len(cache_of(cached)) > 0
    if idle and (keeps_cache or len(idle) < len(lengths)):
        raise CheckError(f"{idle[0]} and {len(idle) - 1} more converted layers did not decode from their state")
    return max(difference(a, b) for a, b in zip(plain.logits, cached.logits, strict=True))


@contextmanager
def _watching_states(model: PreTrainedModel) -> Iterator[dict[str, set[int]]]:
    """Converted causal modules by name → the numbers of tokens that came in together with a state."""
    lengths: dict[str, set[int]] = {}
    handles = []
    for name, module in converted_modules(model).items():
        if module.attnconv.geometry.causal:
            seen = lengths.setdefault(name, set())

            def note(core: Any, args: tuple[Any, ...], kwargs: dict[str, Any], seen: set[int] = seen) -> None:
                if kwargs["state"] is not None:
                    seen.add(args[0].shape[2])

            handles.append(module.attnconv.register_forward_pre_hook(note, with_kwargs=True))
    yield lengths
    for handle in handles:
        handle.remove()


def difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference, relative to the largest expected entry; equal infinities do not differ."""
    expected, found = expected.float(), found.float()
    error = torch.where(expected == found, 0.0, (expected - found).abs()).max().item()
    scale = expected[expected.isfinite()].abs().max().item()
    return error / max(scale, 1e-12)


def _save(model: PreTrainedModel, inputs: Outputs, folder: Path, auto_class: str) -> None:
    """Save a converted model together with what a fresh process needs to compare itself with it."""
    model.save_pretrained(folder)
    torch.save({"inputs": inputs, "outputs": outputs(model, inputs)}, folder / "expected.pt")
    # Part of a composite has a config of its own, which the auto class of the whole does not know.
    known = type(model.config) in getattr(transformers, auto_class)._model_mapping
    note = {"loader": auto_class if known else type(model).__name__, "modules": sorted(converted_modules(model))}
    (folder / "expected.json").write_text(json.dumps(note))


def sentence(error: Exception) -> str:
    """An error in one line of at most 200 characters; of errors that are not ours, with their type."""
    ours = isinstance(error, AttnConvError | CheckError)
    text = ("" if ours else f"{type(error).__name__}: ") + " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
