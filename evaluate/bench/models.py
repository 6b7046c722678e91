"""The models of a benchmark: opened by their headers, prompted with random tokens, run with their own caches."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...compat import cache_argument, cache_of
from ...convert.reading.checkpoint import Checkpoint, load_model, load_tokenizer, open_checkpoint
from ...convert.reading.links import refuse_overwritten
from ..engine.models import evaluated_dtype, positions_of, require_causal
from .cases import Role

SEED = 0


@dataclass
class BenchedModel:
    """A model in the benchmark.

    Attributes:
        role: `"model"` or `"base"`.
        checkpoint: its files.
        dtype: what it runs in.
        loaded: the model while it is in memory.
    """

    role: Role
    checkpoint: Checkpoint
    dtype: torch.dtype
    loaded: PreTrainedModel | None = field(default=None, repr=False)

    @property
    def positions(self) -> float:
        """Longest sequence that the model was made for, in tokens; infinity if it does not say."""
        return positions_of(self.checkpoint)

    @property
    def model(self) -> PreTrainedModel:
        """The loaded model."""
        assert self.loaded is not None, f"{self.checkpoint.source} is not loaded"
        return self.loaded

    def load(self, device: torch.device) -> PreTrainedModel:
        """Load the model anew."""
        self.loaded = load_model(self.checkpoint, dtype=self.dtype, device=device)
        return self.loaded


def open_benched(role: Role, source: str, *, dtype: str, trust_remote_code: bool) -> BenchedModel:
    """Open a causal language model without its weights; a tokenizer is not needed.

    Raises:
        CheckpointError: it cannot be read, or is another kind of model.
    """
    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code, allow_converted=True)
    require_causal(checkpoint)
    refuse_overwritten(checkpoint.path)
    return BenchedModel(role, checkpoint, evaluated_dtype(checkpoint, dtype))


class ModelRunner:
    """Runs a model token by token or all at once.

    Args:
        model: a causal language model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # Logits of a whole prompt can be larger than all the rest.
        takes = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.options: dict[str, Any] = {"logits_to_keep": 1} if takes else {}
        self._cache_argument = cache_argument(model.forward)

    def forward(self, ids: torch.Tensor, cache: Any = None) -> Any:
        """The model's answer to new tokens `[batch, T]`, which go into the cache; None makes a new one."""
        return self.model(input_ids=ids, use_cache=True, **{self._cache_argument: cache}, **self.options)

    def cache_of(self, output: Any) -> Any:
        """The cache in a model's answer."""
        return cache_of(output)


def ordinary_tokens(checkpoints: Sequence[Checkpoint]) -> torch.Tensor:
    """Token ids `[tokens]` that all models know and that mean nothing special to any of them."""
    size = min(checkpoint.config.get_text_config().vocab_size for checkpoint in checkpoints)
    special: set[int] = set()
    for checkpoint in checkpoints:
        special.update(_marked_tokens(checkpoint.config.to_dict()))
        loaded = load_tokenizer(checkpoint)
        tokenizer = getattr(loaded, "tokenizer", loaded)
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            special.update(tokenizer.all_special_ids, tokenizer.added_tokens_decoder)
            # Some models have more rows of embeddings than tokens.
            size = min(size, len(tokenizer))
    allowed = [token for token in range(size) if token not in special]
    return torch.tensor(allowed or [0])


def _marked_tokens(config: Mapping[Any, Any]) -> Iterator[int]:
    """The ids that a configuration gives a meaning: begin and end, padding, images."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _marked_tokens(value)
        elif str(key).endswith(("token_id", "token_ids", "token_index")):
            yield from (token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int))


def random_prompt(tokens: torch.Tensor, *, context: int, batch: int) -> torch.Tensor:
    """Random tokens `[batch, context]`, the same each time."""
    generator = torch.Generator().manual_seed(SEED)
    return tokens[torch.randint(len(tokens), (batch, context), generator=generator)]
