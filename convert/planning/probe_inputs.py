"""Small inputs that make any architecture run once."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Encoder and decoder lengths differ, so that cross-attention shows itself.
_TOKENS, _DECODER_TOKENS, _FRAMES, _SAMPLES = 4, 3, 64, 4000
_BINS = ("num_mel_bins", "input_feat_per_channel")


def candidate_inputs(model: PreTrainedModel, device: str) -> Iterator[dict[str, Tensor]]:
    """Guesses at a forward's arguments, the most likely first.

    Args:
        model: any transformers model.
        device: where the tensors are made.
    """
    config = model.config
    parameters = inspect.signature(model.forward).parameters
    main = model.main_input_name
    ids = torch.ones(1, _TOKENS, dtype=torch.long, device=device)
    makers: dict[str, Callable[[], Tensor]] = {
        "input_ids": lambda: ids,
        "pixel_values": lambda: torch.zeros(1, *_image_shape(config), device=device),
        "input_features": lambda: torch.zeros(1, _first(config, _BINS, 80), _frames(config), device=device),
        "input_values": lambda: torch.zeros(1, _SAMPLES, device=device),
    }
    if main not in makers:
        main = "input_ids"
    inputs = {main: makers[main]()}
    decoder: dict[str, Tensor] = {"decoder_input_ids": torch.ones(1, _DECODER_TOKENS, dtype=torch.long, device=device)}
    if "decoder_input_ids" in parameters and getattr(config, "is_encoder_decoder", False):
        yield {**inputs, **decoder}
    yield inputs
    if "decoder_input_ids" in parameters:
        yield {**inputs, **decoder}
    if main == "input_features":
        # Some want time before frequency.
        features = {main: inputs[main].transpose(1, 2)}
        yield features
        yield {**features, **decoder}
    # Two towers, such as text and image.
    extra = {name: make() for name, make in makers.items() if name in parameters and name not in inputs}
    if extra:
        yield {**inputs, **extra}
    if "spatial_shapes" in parameters:
        yield {**inputs, **_patches(config, device)}
    if main == "pixel_values" or "pixel_values_videos" in parameters:
        frames = _first(config, ("num_frames", "frames_per_clip"), 2)
        video = torch.zeros(1, frames, *_image_shape(config), device=device)
        yield {"pixel_values_videos" if "pixel_values_videos" in parameters else "pixel_values": video}


def _patches(config: Any, device: str) -> dict[str, Tensor]:
    """Rows of patches in the place of an image, for models that take images of any shape."""
    channels, *_ = _image_shape(config)
    size, side = _first(config, ("patch_size",), 16), 2
    return {
        "pixel_values": torch.zeros(1, side * side, channels * size * size, device=device),
        "pixel_attention_mask": torch.ones(1, side * side, dtype=torch.long, device=device),
        "spatial_shapes": torch.full((1, 2), side, device=device),
    }


def _first(config: Any, names: tuple[str, ...], default: Any) -> Any:
    """The first of `names` that the config or one of its sub-configs has."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for part in parts:
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def _image_shape(config: Any) -> tuple[int, int, int]:
    size = _first(config, ("image_size",), 224)
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    return _first(config, ("num_channels", "in_channels", "in_chans"), 3), height, width


def _frames(config: Any) -> int:
    """Whisper-like encoders insist on the length their positions were made for."""
    positions = _first(config, ("max_source_positions",), None)
    return _FRAMES if positions is None else 2 * int(positions)
