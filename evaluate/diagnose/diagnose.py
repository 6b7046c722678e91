"""Diagnosing a model: what each of its attention heads looks at, on real text and on repeated random tokens."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...convert.reading.checkpoint import load_model, load_tokenizer, open_checkpoint
from ...convert.surgery.head import evaluating
from ...convert.surgery.recording import AttentionLayer, WatchedCall, attention_layers
from ...convert.surgery.swap import converted_modules
from ...errors import CheckpointError, DataError, PlanError
from ..bench.footprint import native_window
from ..engine.models import find_device
from ..engine.progress import Progress
from ..tasks.packaged import data_file
from ..tasks.textfile import adds_bos, load_tokens
from . import measures
from .maps import watch_tokens
from .profiles import MEASURES, Diagnosis, HeadProfile, LayerProfile, SkippedLayer
from .roles import role_of

# Random sequences, and tokens of each that come twice: a score of 0.2 is then a mean over 512 look-ups.
REPETITIONS = 4
PERIOD = 128
SEED = 0


def diagnose_model(
    source: str | Path | PreTrainedModel,
    *,
    text: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    field: str = "text",
    tokens: int = 4096,
    context: int = 512,
    window: int = 64,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Diagnosis:
    """Measure every head of every self-attention layer of a model that has not been converted.

    The model computes what it always does; the weights are read on the way, a layer at a time. Causal heads are
    measured by the queries of the second half of each window: those of the first have too little before them to show
    how far a head looks.

    Args:
        source: a local folder, Hub id or `.gguf` file, or a loaded model.
        text: name of a packaged text, or a `.txt` or `.jsonl` file, or either with `.gz`.
        tokenizer: the tokenizer of a loaded model; not needed otherwise.
        field: the key that holds the text in each JSON line.
        tokens: tokens of the text to use; a shorter text is used whole.
        context: tokens in a window, at least four times `window`; less where the model has fewer positions.
        window: newest tokens that count as near.
        device: where to run a model that is not loaded yet; None means a GPU if there is one.
        trust_remote_code: whether a model that brings its own code may run it.
        progress: called with (tokens done, tokens in all, what is being done).

    Raises:
        CheckpointError: the model cannot be read, is a conversion already, or takes no text.
        PlanError: its attention cannot be found, or none of its layers can be diagnosed.
        DataError: the text cannot be used, or a number is out of its range.
    """
    model, tokenizer, name = _open(source, tokenizer, device, trust_remote_code)
    layers = attention_layers(model)
    able = {layer.name: layer for layer in layers if layer.refused is None}
    if not able:
        reason = layers[0].refused if layers else "no self-attention of it goes through transformers' interface"
        raise PlanError(f"No attention layer of {name} can be diagnosed: {reason}.")
    context = _fitting_context(model, context, window)
    causal = all(layer.module.geometry.causal for layer in able.values())
    windows = _windows(tokenizer, text, field, tokens, context, causal)
    if windows[0].numel() < 4 * window:
        raise DataError(f"{text} holds {windows[0].numel()} tokens; a window of {window} needs four times as many.")
    repeated, period = _repeated(tokenizer, model, context)
    in_all = sum(part.numel() for part in (*windows, *(repeated if causal else ())))
    with evaluating(model):
        sums = _Sums()
        for part in windows:
            watch_tokens(model, part[None], sums.add(able, lambda w, c: _text_measures(w, window, causal=c)), able)
            _tell(progress, sums, part, in_all)
        for part in repeated if causal else ():
            scores = sums.add(able, lambda w, _: {"induction": measures.induction_score(w, period)})
            watch_tokens(model, part[None], scores, able)
            _tell(progress, sums, part, in_all)
    return Diagnosis(
        source=name,
        model_type=str(model.config.model_type),
        text=str(text),
        tokens=sum(part.numel() for part in windows),
        context=context,
        window=window,
        layers=tuple(_profile(layer, sums.means(layer.name), model) for layer in able.values() if layer.name in sums),
        skipped=_skipped(layers, sums),
    )


class _Sums:
    """Sums of measures over calls, by layer; each value is `[heads]` fp64 on the CPU."""

    def __init__(self) -> None:
        self.totals: dict[str, dict[str, Tensor]] = {}
        self.counts: dict[tuple[str, str], int] = {}
        self.done = 0

    def __contains__(self, name: str) -> bool:
        return name in self.totals

    def add(
        self, layers: Mapping[str, AttentionLayer], measure: Callable[[Tensor, bool], Mapping[str, Tensor]]
    ) -> Callable[[WatchedCall], None]:
        """A watcher that adds what `measure(weights, causal)` gives."""

        def watcher(call: WatchedCall) -> None:
            totals = self.totals.setdefault(call.name, {})
            for key, values in measure(call.weights(), layers[call.name].module.geometry.causal).items():
                # The row of the batch.
                value = values[0].double().cpu()
                totals[key] = totals[key] + value if key in totals else value
                self.counts[call.name, key] = self.counts.get((call.name, key), 0) + 1

        return watcher

    def means(self, name: str) -> dict[str, list[float]]:
        return {key: (total / self.counts[name, key]).tolist() for key, total in self.totals[name].items()}


def _text_measures(weights: Tensor, window: int, *, causal: bool) -> dict[str, Tensor]:
    if causal:
        weights = weights[..., weights.shape[-1] // 2 :, :]
    behind, ahead = measures.mean_distances(weights)
    found = {
        "mean_distance": measures.mean_distance(weights),
        "distance_90": measures.covering_distance(weights),
        # A window counts the query itself.
        "window_90": 1 + measures.covering_distance(weights, num_sinks=measures.NUM_SINKS),
        "entropy": measures.entropy(weights),
        "relative_entropy": measures.relative_entropy(weights, causal=causal),
        "sink_mass": measures.sink_mass(weights),
        "local_mass": measures.local_mass(weights, window),
        "streaming_mass": measures.streaming_mass(weights, window),
        "monotonicity": measures.monotonicity(weights),
        "behind": behind,
        "ahead": ahead,
        "mass_ahead": measures.mass_ahead(weights),
    }
    assert found.keys() == set(MEASURES)
    return found


def _profile(layer: AttentionLayer, means: Mapping[str, Sequence[float]], model: PreTrainedModel) -> LayerProfile:
    causal, heads = layer.module.geometry.causal, []
    for head in range(layer.module.geometry.num_heads):
        values: dict[str, Any] = {key: value[head] for key, value in means.items()}
        induction = values.pop("induction", None) if causal else None
        role = role_of(induction=induction, local=values["local_mass"], streaming=values["streaming_mass"])
        heads.append(HeadProfile(head=head, role=role, induction=induction, **values))
    own = native_window(model.config, layer.module.layer_idx)
    return LayerProfile(layer.index, layer.name, tuple(heads), causal, own)


def _skipped(layers: Sequence[AttentionLayer], sums: _Sums) -> tuple[SkippedLayer, ...]:
    unseen = "it did not run on text"
    return tuple(
        SkippedLayer(layer.index, layer.name, layer.refused or unseen) for layer in layers if layer.name not in sums
    )


def _tell(progress: Progress | None, sums: _Sums, part: Tensor, in_all: int) -> None:
    sums.done += part.numel()
    if progress is not None:
        progress(sums.done, in_all, "diagnosing")


def _open(
    source: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    device: str | None,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    if isinstance(source, PreTrainedModel):
        model, name = source, str(source.config.name_or_path or type(source).__name__)
    else:
        checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code, allow_converted=True)
        name = checkpoint.source
        if checkpoint.is_converted:
            raise _converted_already(name)
        if tokenizer is None:
            loaded = load_tokenizer(checkpoint)
            tokenizer = getattr(loaded, "tokenizer", loaded)
        model = load_model(checkpoint, device=find_device(device))
    if converted_modules(model):
        raise _converted_already(name)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise CheckpointError(f"{name} comes without a tokenizer, and a diagnosis needs text.")
    if model.config.is_encoder_decoder or model.base_model.main_input_name != "input_ids":
        raise CheckpointError(f"{name} is a {type(model).__name__}; a diagnosis needs a model that takes one text.")
    return model, tokenizer, name


def _converted_already(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name} is a conversion already, and its original attention is gone: diagnose the model it was made from."
    )


def _fitting_context(model: PreTrainedModel, context: int, window: int) -> int:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    fitting = min(context, positions) if isinstance(positions, int) and positions > 1 else context
    if window < 1 or fitting < 4 * window:
        reason = f"the model's {fitting} positions" if fitting < context else f"a context of {fitting}"
        raise DataError(f"A window of {window} does not suit {reason}: it must be at least 1 and at most a quarter.")
    return fitting


def _windows(
    tokenizer: PreTrainedTokenizerBase, text: str | Path, field: str, tokens: int, context: int, causal: bool
) -> list[Tensor]:
    """Windows `[at most context]` of the text; all of the same length if the text is long enough."""
    if tokens < context:
        raise DataError(f"tokens is {tokens}; it must be at least the context of {context}.")
    ends = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    framed = not causal and None not in ends
    inner = context - 2 if framed else context
    # Whole windows only: a short one would make heads look shorter-sighted.
    limit = tokens // context * inner
    stream = load_tokens(data_file(str(text)), tokenizer, context=inner, field=field, limit=limit)
    whole = stream[: max(inner, stream.numel() // inner * inner)].split(inner)
    if not framed:
        return list(whole)
    first, last = (torch.tensor([end]) for end in ends)
    return [torch.cat([first, part, last]) for part in whole]


def _repeated(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, context: int) -> tuple[list[Tensor], int]:
    """Random sequences that come twice, and how many tokens are repeated; no token occurs twice in a sequence."""
    special = set(tokenizer.all_special_ids)
    size = min(len(tokenizer), int(model.config.get_text_config().vocab_size))
    usable = torch.tensor([token for token in range(size) if token not in special])
    # With the token that begins a text there is one more.
    period = min(PERIOD, (context - 1) // 2, usable.numel())
    generator = torch.Generator().manual_seed(SEED)
    start = [torch.tensor([tokenizer.bos_token_id])] if adds_bos(tokenizer) else []
    found = []
    for _ in range(REPETITIONS):
        drawn = usable[torch.randperm(usable.numel(), generator=generator)[:period]]
        found.append(torch.cat([*start, drawn, drawn]))
    return found, period
