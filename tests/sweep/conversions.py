"""Convert a tiny model of any type and check whatever must hold for a converted model."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from attnconv.convert import apply_plan, converted_modules, make_plan, probe
from attnconv.errors import AttnConvError
from attnconv.recipes import AttentionRule
from torch import Tensor
from transformers import PreTrainedModel

from tiny_models import PADDING, auto_classes, build, outputs, working_inputs

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


def examine(mapping: str, model_type: str, folder: Path | None = None) -> Verdict:
    """Build, convert and check one type; both conversions are saved under `folder` for a later reload."""
    try:
        model = build(mapping, model_type)
        inputs, dense = working_inputs(model)
    except Exception as error:  # noqa: BLE001 - whatever transformers raises
        return Verdict("unbuildable", _sentence(error))
    for part, layers in PARTS.items():
        try:
            converted = convert(build(mapping, model_type), layers)
            _check_all(converted, model, inputs, dense)
            if folder is not None:
                save(converted, inputs, folder / f"{mapping}.{model_type}.{part}", auto_classes(mapping)[model_type])
        except AttnConvError as error:
            return Verdict("refused", f"{part}: {_sentence(error)}")
        except Exception as error:  # noqa: BLE001 - reported as the bug that it is
            return Verdict("failed", f"{part}: {_sentence(error)}")
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


def _check_all(model: PreTrainedModel, dense_model: PreTrainedModel, inputs: Outputs, dense: Outputs) -> None:
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
    error = error_of(model, inputs)
    # Some models break the rule by themselves: nothing that is not attention can be mended here.
    if not error <= TOLERANCE and error_of(dense_model, inputs) <= TOLERANCE:
        raise CheckError(message.format(error))


def _padding_matters(model: PreTrainedModel, inputs: Outputs) -> float:
    changed = dict(inputs)
    changed["input_ids"] = inputs["input_ids"].clone()
    changed["input_ids"][0, :PADDING] += 1
    before, after = outputs(model, inputs), outputs(model, changed)
    length = inputs["input_ids"].shape[1]
    errors = []
    for name, value in before.items():
        # Outputs by token: those of padding itself may be anything.
        by_token = value.ndim > 1 and value.shape[1] == length and "encoder" not in name and "decoder_input_ids" not in inputs
        real = slice(PADDING, None) if by_token else slice(None)
        errors.append(difference(value[:1, real], after[name][:1, real]))
        errors.append(difference(value[1:], after[name][1:]))
    return max(errors)


def _company_matters(model: PreTrainedModel, inputs: Outputs) -> float:
    """Of decoders only: row 0 of the padded batch against the same row without padding."""
    if set(inputs) != {"input_ids", "attention_mask"}:
        return 0.0
    alone = {name: value[:1, PADDING:] for name, value in inputs.items()}
    together, single = outputs(model, inputs), outputs(model, alone)
    names = [name for name, value in together.items() if value.ndim == 3 and value.shape[1] == inputs["input_ids"].shape[1]]
    return max((difference(together[name][:1, PADDING:], single[name]) for name in names), default=0.0)


def _cache_matters(model: PreTrainedModel, inputs: Outputs) -> float:
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
    if idle and len(idle) < len(lengths) or (idle and _has_cache(cached)):
        raise CheckError(f"{idle[0]} and {len(idle) - 1} more converted layers did not decode from their state")
    return max(difference(a, b) for a, b in zip(plain.logits, cached.logits, strict=True))


def _has_cache(result: Any) -> bool:
    return result.past_key_values is not None and len(result.past_key_values) > 0


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
    """Largest difference, relative to the largest expected entry."""
    expected, found = expected.float(), found.float()
    same = expected == found
    error = torch.where(same, 0.0, (expected - found).abs()).max().item()
    return error / max(expected[expected.isfinite()].abs().max().item(), 1e-12)


def save(model: PreTrainedModel, inputs: Outputs, folder: Path, auto_class: str) -> None:
    """Save a converted model together with what a fresh process needs to compare itself with it."""
    model.save_pretrained(folder)
    torch.save({"inputs": inputs, "outputs": outputs(model, inputs)}, folder / "expected.pt")
    note = {
        "loader": auto_class if type(model.config) in getattr(transformers, auto_class)._model_mapping else type(model).__name__,
        "modules": sorted(converted_modules(model)),
    }
    (folder / "expected.json").write_text(json.dumps(note))


def _sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    prefix = "" if isinstance(error, AttnConvError | CheckError) else f"{type(error).__name__}: "
    return (prefix + " ".join(lines))[:200]
