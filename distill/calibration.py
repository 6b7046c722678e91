"""One pass over a text that measures what a rewrite wants to know of a model."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..convert.rewriting.moments import Moments, MomentSums
from ..errors import TrainingError
from ..recipes import CalibrateSection
from .batches import Batch
from .data import TokenStream
from .progress import Progress


def measure_moments(
    model: PreTrainedModel, tokenizer: Any, section: CalibrateSection, progress: Progress | None = None
) -> Moments:
    """Run a model over the beginning of a text and gather the moments of its attention layers.

    Args:
        model: a model whose attention has the projections `q_proj` and `o_proj`.
        tokenizer: its tokenizer.
        section: which text, and how much of it.
        progress: whom to tell.

    Raises:
        DataError: the text cannot be read, or is too short.
        TrainingError: the model has no tokenizer to read text with, or it gives numbers that are not finite.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TrainingError("The model has no tokenizer, so it cannot be calibrated on text")
    layers = _attention(model)
    sums = {index: _sums(attention) for index, attention in layers.items()}
    with ExitStack() as hooks, torch.no_grad():
        for index, attention in layers.items():
            into, out = attention.get_submodule("q_proj"), attention.get_submodule("o_proj")
            hooks.enter_context(into.register_forward_pre_hook(_taking(sums[index].add_inputs)))
            hooks.enter_context(out.register_forward_pre_hook(_taking(sums[index].add_outputs)))
        if progress is not None:
            progress.phase(f"Calibrating on {section.tokens} tokens")
        for batch in _batches(TokenStream(section, tokenizer), section):
            model.base_model(**batch.to(model.device).inputs(model.dtype))
        if progress is not None:
            progress.end()
    moments = {index: gathered.means() for index, gathered in sums.items()}
    if not all(bool(layer.second.isfinite().all()) for layer in moments.values()):
        raise TrainingError("The model gives numbers that are not finite on the text it was to be calibrated on")
    return moments


def _attention(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention modules by layer."""
    return {
        index: module
        for module in model.modules()
        if isinstance(index := getattr(module, "layer_idx", None), int)
        and isinstance(getattr(module, "q_proj", None), nn.Linear)
        and isinstance(getattr(module, "o_proj", None), nn.Linear)
    }


def _sums(attention: nn.Module) -> MomentSums:
    output = attention.get_submodule("o_proj").get_parameter("weight")
    head_dim: Any = attention.head_dim
    return MomentSums(output, output.shape[1] // int(head_dim))


def _taking(take: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _module, inputs: take(inputs[0])


def _batches(stream: TokenStream, section: CalibrateSection) -> Iterator[Batch]:
    """One sequence at a time, the last as long as there are tokens left."""
    left = section.tokens
    for sequence in stream.sequences(min(section.sequence_length, left)):
        batch = stream.collate([sequence])
        taken = min(left, batch.num_tokens)
        positions = None if batch.position_ids is None else batch.position_ids[:, :taken]
        yield Batch(batch.input_ids[:, :taken], position_ids=positions)
        left -= taken
        if not left:
            return
