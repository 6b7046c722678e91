"""Tiny random models of every type in transformers' auto mappings, and inputs that make them run."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from tiny import tiny_config
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

# Of a type that several auto classes know, the first one counts.
MAPPINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "causal_lm": (("MODEL_FOR_CAUSAL_LM_MAPPING", "AutoModelForCausalLM"),),
    "masked_lm": (("MODEL_FOR_MASKED_LM_MAPPING", "AutoModelForMaskedLM"),),
    "seq2seq": (
        ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "AutoModelForSeq2SeqLM"),
        ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING", "AutoModelForSpeechSeq2Seq"),
    ),
    "vision": (
        ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "AutoModelForImageClassification"),
        ("MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING", "AutoModelForZeroShotImageClassification"),
        ("MODEL_FOR_IMAGE_MAPPING", "AutoModel"),
        ("MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING", "AutoModelForMaskedImageModeling"),
        ("MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING", "AutoModelForVideoClassification"),
    ),
}
LENGTH, PADDING, BATCH = 9, 3, 2
# Special tokens are below and above these.
FIRST_ID, LAST_ID = 3, 95
SAMPLES, FRAMES = 4000, 64


def auto_classes(mapping: str) -> dict[str, str]:
    """Every model type of a mapping → the name of the auto class that builds it."""
    found: dict[str, str] = {}
    for names, auto_class in MAPPINGS[mapping]:
        for model_type in getattr(modeling_auto, f"{names}_NAMES"):
            found.setdefault(model_type, auto_class)
    return found


def build(mapping: str, model_type: str, seed: int = 0) -> PreTrainedModel:
    """Return a tiny model in eval mode whose layers all matter; raises whatever transformers raises."""
    config = tiny_config(model_type)
    model_class = _model_class(getattr(transformers, auto_classes(mapping)[model_type]), config)
    config_class = getattr(model_class, "config_class", None) or type(config)
    if not isinstance(config, config_class):
        parts = (part for part in vars(config).values() if isinstance(part, config_class))
        config = next(parts, config)
    if mapping == "causal_lm":
        for part in (config, config.get_text_config(decoder=True)):
            if hasattr(part, "is_decoder"):
                part.is_decoder = True
    torch.manual_seed(seed)
    model = model_class._from_config(config).eval()
    enliven(model)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        # Some models have a generate method of their own that insists on these.
        generation.pad_token_id = 0
        generation.decoder_start_token_id = generation.decoder_start_token_id or 1
    return model


def _model_class(auto_class: Any, config: PreTrainedConfig) -> type[PreTrainedModel]:
    found = auto_class._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


@torch.no_grad()
def enliven(model: PreTrainedModel) -> None:
    """Raise weights to the size that keeps activations alive through all layers; they start smaller, or at zero."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name and parameter.is_floating_point():
            target, spread = parameter[0].numel() ** -0.5, parameter.std().item()
            if spread == 0 and not parameter.any():
                parameter.normal_(0, target)
            elif 0 < spread < target:
                parameter.mul_(target / spread)


def candidate_inputs(model: PreTrainedModel, seed: int = 1) -> Iterator[dict[str, Tensor]]:
    """Guesses at a batch that makes the model run, the likeliest first; text is padded on the left of row 0."""
    config, parameters = model.config, inspect.signature(model.forward).parameters
    values = _values(config, torch.Generator().manual_seed(seed))
    main = {"inputs": "input_values"}.get(model.main_input_name, model.main_input_name)
    main = main if main in values else "input_ids"
    inputs = {main: values[main]}
    if main == "input_ids" and "attention_mask" in parameters:
        inputs["attention_mask"] = values["attention_mask"]
    decoder = {"decoder_input_ids": values["input_ids"][:, :4]}
    if "decoder_input_ids" in parameters and getattr(config, "is_encoder_decoder", False):
        yield {**inputs, **decoder}
        yield {**inputs, main: values[main].transpose(1, -1), **decoder}
    yield inputs
    if main == "input_features":
        yield {main: values[main].transpose(1, 2)}
    towers = {name: value for name, value in values.items() if name in parameters}
    if len(towers) > 1:
        yield {**inputs, **towers}
    if "spatial_shapes" in parameters:
        yield {**inputs, **_patches(config, values["pixel_values"])}
    video = values["pixel_values"][:, None].expand(-1, _first(config, ("num_frames", "frames_per_clip"), 2), -1, -1, -1)
    yield {"pixel_values_videos" if "pixel_values_videos" in parameters else "pixel_values": video}


def _values(config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(FIRST_ID, LAST_ID, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    size = _first(config, ("image_size",), 64)
    height, width = (size, size) if isinstance(size, int) else tuple(size.values() if isinstance(size, dict) else size)
    image = (_first(config, ("num_channels", "in_chans"), 3), height, width)
    num_bins = _first(config, ("num_mel_bins", "input_feat_per_channel"), 80)
    num_frames = 2 * _first(config, ("max_source_positions",), FRAMES // 2)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(BATCH, *image, generator=generator),
        "input_features": torch.randn(BATCH, num_bins, num_frames, generator=generator),
        "input_values": torch.randn(BATCH, SAMPLES, generator=generator),
    }


def _patches(config: PreTrainedConfig, images: Tensor) -> dict[str, Tensor]:
    """Images as rows of patches, with the number of those in each direction."""
    size = _first(config, ("patch_size",), 8)
    batch, height, width = images.shape[0], images.shape[2] // size, images.shape[3] // size
    return {
        "pixel_values": torch.nn.functional.unfold(images, size, stride=size).transpose(1, 2),
        "pixel_attention_mask": torch.ones(batch, height * width, dtype=torch.long),
        "spatial_shapes": torch.tensor([[height, width]] * batch),
    }


def _first(config: Any, names: tuple[str, ...], default: Any) -> Any:
    """The first of some fields that is set in the config or one of its sub-configs."""
    parts = [config, *(getattr(config, part, None) for part in getattr(config, "sub_configs", {}))]
    values = (getattr(part, name, None) for part in parts for name in names)
    return next((value for value in values if value is not None), default)


@torch.no_grad()
def outputs(model: PreTrainedModel, inputs: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
    """Every floating-point tensor that a forward returns, by name."""
    # Some models draw what they hide.
    torch.manual_seed(0)
    result = model(**inputs, **kwargs)
    items = result.items() if hasattr(result, "items") else enumerate(result)
    return {
        str(name): value
        for name, value in items
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel()
    }


def working_inputs(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs with which a model runs, and what it says to them; raises what the first guess raised."""
    failure: Exception | None = None
    for inputs in candidate_inputs(model):
        try:
            return inputs, outputs(model, inputs)
        # A wrong guess shows itself in any way.
        except Exception as error:  # noqa: BLE001
            failure = failure or error
    assert failure is not None
    raise failure
