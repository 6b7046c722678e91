"""Dense feed-forwards made mixtures of experts, in a class that transformers has."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ...errors import PlanError
from ..reading.checkpoint import Checkpoint
from ..reading.weight_files import FLOAT_TYPES
from .branches import Branch, check_tensors, merged, open_branches, public_names
from .classes import CLASSES, PARTS, ExpertClass, Shared
from .fitting import check_settings, class_for, dense_layers, with_defaults
from .routing import Centroids
from .starts import Copies, Matrices, random_rows
from .steps import Step
from .tensors import Target, columns, elementwise, joined, made, rows

OF_LAYERS = re.compile(r"(model\.layers\.(?P<layer>\d+))\.(?:mlp\.(?P<part>.+)|self_attn\.(?P<projection>\w+)\.bias)")
WEIGHT = ".weight"
Layers = Callable[[int, int], bool]
"""Whether a layer, by its place and the number of all, is meant."""


class Experts(Step):
    """Make a mixture of experts of every feed-forward.

    The weights of a token's experts add up to 1, so the sum of experts that are copies is the dense feed-forward. With
    a granularity of G an expert is one G-th of it: the G parts of one copy have the same row in the router, so that
    they are chosen together and weigh the same, and their last matrices are G times as large. Where the expert that all
    tokens go through is the dense feed-forward too, that and the sum of the others count for a half each.

    Args:
        num_experts: experts of each layer.
        active: how many of them a token goes through.
        target: model type of the class; None takes the first that fits the model.
        granularity: how many experts are as wide as one feed-forward.
        shared: `dense` or `none` for the expert that all tokens go through; `auto` is `dense` where a gate scales it.
        layers: which layers are meant; None means all.
        start: what the experts start as.
        zero_router: leave the routers at zero instead of drawing them.
        seed: what they are drawn from.
        sources: fine-tuned branches of the model, folders or Hub ids, that take turns in being what copies are made of.
        include_base: whether the model itself is the first of them.
        rest: what else the result has: `average` over all that experts are made of, `base`, or one of the sources.
        texts: for each copy the texts of its subject, for routers that know it; None draws them.
        text_tokens: how much of each is read.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        active: int,
        target: str | None = None,
        granularity: int = 1,
        shared: str = "auto",
        layers: Layers | None = None,
        start: Copies | None = None,
        zero_router: bool = False,
        seed: int = 0,
        sources: Sequence[str] = (),
        include_base: bool = True,
        rest: str = "average",
        texts: Sequence[Sequence[str]] | None = None,
        text_tokens: int = 4096,
    ) -> None:
        self.num_experts = num_experts
        self.active = active
        self.target = target
        self.granularity = granularity
        self.shared = shared
        self.layers = layers
        self.start = start or Copies()
        self.zero_router = zero_router
        self.seed = seed
        self.branches = tuple(sources)
        self.include_base = include_base
        self.rest = rest
        self.texts = texts
        self.text_tokens = text_tokens
        self._branches: tuple[Branch, ...] = ()
        self._centroids: Centroids | None = None
        self._row = CLASSES["mixtral"]
        self._dense: Mapping[str, Any] = {}
        self._rounded: str | None = None

    @property
    def summary(self) -> str:
        part = "" if self.granularity == 1 else f", each 1/{self.granularity} as wide"
        of = ""
        if self.branches:
            names = [*(["the model"] if self.include_base else []), *self.sources]
            of = f" out of those of {', '.join(names)}"
        counts = f"{self.num_experts} experts of which a token goes through {self.active}"
        return f"each feed-forward made {counts}{part}{of}"

    @property
    def inexact(self) -> str | None:
        mixed = "experts of several models" if self.branches else None
        return " and ".join(filter(None, (mixed, self.start.inexact, self._rounded))) or None

    @property
    def sources(self) -> Mapping[str, Checkpoint]:
        return public_names(self._branches)

    def begin(self, checkpoint: Checkpoint) -> None:
        self._branches = open_branches(self.branches, checkpoint)
        if self.texts is not None:
            self._centroids = Centroids(checkpoint, self.texts, tokens=self.text_tokens)

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuse what would not be exact, and settle the class."""
        self._row = class_for(config, self.target)
        self._dense = with_defaults(config)
        check_settings(config, self._dense, self._row)
        self._check_counts(self._dense["intermediate_size"])
        count = self._dense["num_hidden_layers"]
        dense_layers(self._row, [number for number in range(count) if not self._is_meant(number)], count)

    def _check_counts(self, width: int) -> None:
        for name, count in {"active": self.active, "num_experts": self.num_experts}.items():
            if count % self.granularity:
                raise PlanError(
                    f"experts cannot have {name} {count} with a granularity of {self.granularity}, for all parts of a "
                    f"feed-forward must be taken equally often: give a multiple of {self.granularity}"
                )
        copies, models = self.num_experts // self.granularity, len(self.branches) + self.include_base
        if self.branches and copies % models:
            raise PlanError(
                f"experts cannot be {copies} copies of {models} models, of which all are needed equally often: give "
                f"num_experts a multiple of {models * self.granularity}"
            )
        if self.texts is not None and len(self.texts) != copies:
            raise PlanError(
                f"experts are {copies} copies, and there are texts for {len(self.texts)}: give each copy its own texts"
            )
        if width % self.granularity:
            raise PlanError(
                f"experts cannot be 1/{self.granularity} of feed-forwards that are {width} wide: give a granularity "
                f"that divides {width}"
            )
        if self.granularity > 1 and self.zero_router:
            raise PlanError(
                "experts with a granularity above 1 need routers that tell copies apart, or ties mix their parts: "
                "write router: random"
            )
        shared = self._row.shared
        if shared is not None and shared.setting is None and self._shares_dense and self.granularity > 1:
            raise PlanError(
                f"experts of a {self._row.model_type} cannot be narrower than the one that all tokens go through: "
                "write shared: none"
            )
        if self.shared == "dense" and shared is None:
            raise PlanError(
                f"experts of a {self._row.model_type} have none that all tokens go through: write shared: none"
            )

    @property
    def _shares_dense(self) -> bool:
        """Whether the expert that all tokens go through is the dense feed-forward."""
        shared = self._row.shared
        return shared is not None and (self.shared == "dense" or (self.shared == "auto" and shared.gate is not None))

    @property
    def _scale(self) -> float:
        """What the experts' last matrices are multiplied by."""
        return self.granularity * (0.5 if self._shares_dense else 1.0)

    def _is_meant(self, number: int) -> bool:
        return self.layers is None or self.layers(number, self._dense["num_hidden_layers"])

    def claims(self, tensor: Target) -> bool:
        # With branches it also says what becomes of all else.
        return bool(self.branches) or OF_LAYERS.fullmatch(tensor.name) is not None

    def rewrite(self, claimed: Mapping[str, Target]) -> Iterable[Target]:
        for branch in self._branches:
            check_tensors(branch, claimed)
        models = [branch.tensors for branch in self._branches]
        if self.include_base or not models:
            models.insert(0, claimed)
        rest = self._rest(claimed, models)
        layers: dict[str, dict[str, Target]] = {}
        biased = set()
        for name, tensor in claimed.items():
            found = OF_LAYERS.fullmatch(name)
            if found is None:
                yield merged(name, rest)
                continue
            layer, part, projection = found.group(1, "part", "projection")
            if projection in self._row.biases:
                biased.add(name)
                yield merged(name, rest)
            elif part is not None and part.removesuffix(WEIGHT) in PARTS and part.endswith(WEIGHT):
                layers.setdefault(layer, {})[part.removesuffix(WEIGHT)] = tensor
            else:
                raise PlanError(
                    f"experts cannot take the tensor {name!r} over: a {self._row.model_type} model has no place for it"
                )
        count = self._dense["num_hidden_layers"]
        whole = [layer for layer, parts in layers.items() if len(parts) == len(PARTS)]
        if len(whole) != count or len(layers) != count:
            raise PlanError(
                f"experts found whole feed-forwards in {len(whole)} of {count} layers: the model's files are not "
                "complete"
            )
        for layer, parts in layers.items():
            names = [parts[part].name for part in PARTS]
            gate, up, down = (merged(name, rest) for name in names)
            yield from self._zero_biases(layer, _computing_type(down), biased)
            if self._is_meant(int(layer.rpartition(".")[2])):
                copies = [(model[names[0]], model[names[1]], model[names[2]]) for model in models]
                yield from self._mixture(layer, copies, (gate, up, down))
            else:
                yield from (gate, up, down)

    def _rest(self, claimed: Mapping[str, Target], models: list[Mapping[str, Target]]) -> list[Mapping[str, Target]]:
        """What is averaged to give all that is no expert."""
        if self.rest == "average":
            return models
        if self.rest == "base":
            return [claimed]
        return [branch.tensors for branch in self._branches if branch.name == self.rest][:1]

    def _mixture(self, layer: str, copies: list[Matrices], matrices: Matrices) -> Iterator[Target]:
        """The tensors of one layer's mixture: experts made of copies in turn, and for the rest a feed-forward."""
        row, dtype = self._row, _computing_type(matrices[-1])
        turns = [copies[number // self.granularity % len(copies)] for number in range(self.num_experts)]
        experts = [self._expert(layer, number, copy) for number, copy in enumerate(turns)]
        if row.fused:
            yield from _fused(layer, row, experts)
        else:
            for number, expert in enumerate(experts):
                for part, matrix in zip(row.parts, expert, strict=True):
                    yield replace(matrix, name=f"{layer}.{row.expert.format(expert=number, part=part)}")
        hidden = matrices[-1].shape[0]
        if row.shared is not None:
            yield from self._shared(layer, row.shared, matrices)
        if row.correction is not None:
            name, shape = row.correction
            yield _zeros(f"{layer}.{name}", [self.num_experts if n < 0 else n for n in shape], torch.float32)
        router_dtype = dtype if row.router_dtype is None else FLOAT_TYPES[row.router_dtype]
        yield self._router(layer, hidden, router_dtype)

    def _expert(self, layer: str, number: int, matrices: Matrices) -> Matrices:
        """The matrices of one expert: a part of the feed-forward, as it starts, its last matrix scaled."""
        width = matrices[0].shape[0] // self.granularity
        first = number % self.granularity * width
        gate, up = (rows(matrix, first, first + width) for matrix in matrices[:2])
        part = gate, up, columns(matrices[2], first, first + width)
        gate, up, down = self.start.start(part, f"{layer} expert {number}")
        return gate, up, self._scaled(down, self._scale)

    def _scaled(self, matrix: Target, scale: float) -> Target:
        if scale == 1:
            return matrix
        dtype = _computing_type(matrix)
        if scale.as_integer_ratio()[0].bit_count() > 1 and dtype.itemsize < 4:
            name = str(dtype).removeprefix("torch.")
            self._rounded = (
                f"{scale:g} times the last matrices rounded to {name}, unless the granularity is a power of two or "
                "the model is cast to float32 before"
            )
        return elementwise(matrix, dtype, lambda piece: piece * scale)

    def _shared(self, layer: str, shared: Shared, matrices: Matrices) -> Iterator[Target]:
        gate, up, down = matrices
        if not self._shares_dense:
            if shared.optional:
                return
            width = gate.shape[0] // self.granularity
            gate, up = rows(gate, 0, width), rows(up, 0, width)
            down = _zeros(down.name, (down.shape[0], width), _computing_type(down))
        elif shared.gate is None:
            down = self._scaled(down, 0.5)
        names = [f"{layer}.{shared.matrix.format(part=part)}" for part in shared.parts]
        if names[0] == names[1]:
            width, hidden = gate.shape
            yield joined(names[0], (2 * width, hidden), [gate, up])
            yield replace(down, name=names[2])
        else:
            for name, matrix in zip(names, (gate, up, down), strict=True):
                yield replace(matrix, name=name)
        if shared.gate is not None:
            # The sigmoid of zero is a half.
            yield _zeros(f"{layer}.{shared.gate}", (1, down.shape[0]), _computing_type(down))

    def _zero_biases(self, layer: str, dtype: torch.dtype, present: set[str]) -> Iterator[Target]:
        dense = self._dense
        head_dim = dense.get("head_dim") or dense["hidden_size"] // dense["num_attention_heads"]
        for projection in self._row.zero_biases.get(dense["model_type"], ()):
            name = f"{layer}.self_attn.{projection}.bias"
            heads = dense["num_attention_heads" if projection == "q_proj" else "num_key_value_heads"]
            if name not in present:
                yield _zeros(name, (heads * head_dim,), dtype)

    def _router(self, layer: str, hidden: int, dtype: torch.dtype) -> Target:
        name = f"{layer}.{self._row.router}"
        shape, deviation = (self.num_experts, hidden), self._dense["initializer_range"]
        if self.zero_router:
            return _zeros(name, shape, dtype)
        centroids = self._centroids

        def weights() -> Tensor:
            if centroids is not None:
                return centroids.rows(layer).repeat_interleave(self.granularity, 0).to(dtype)
            drawn = random_rows(shape, self.granularity, deviation=deviation, seed=self.seed, name=name)
            return drawn.to(dtype)

        return made(name, shape, dtype, (), weights)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What the dense model's settings were, defaults written out: those of the two classes differ."""
        row, dense = self._row, with_defaults(config)
        general = PreTrainedConfig().to_dict().keys()
        own = CONFIG_MAPPING[row.model_type]().to_dict().keys() - general
        wanted = own | (general & config.keys()) | {"dtype", "head_dim", "tie_word_embeddings"}
        kept = {key: value for key, value in dense.items() if key in wanted and key != "_name_or_path"}
        for key in ("dtype", "head_dim"):
            if kept.get(key) is None:
                kept.pop(key, None)
        if config["model_type"] not in row.windows:
            # A stray setting that the dense class does not look at, and this one would.
            kept["sliding_window"] = None
        count, width = dense["num_hidden_layers"], dense["intermediate_size"]
        kept |= {row.width: width // self.granularity, row.experts: self.num_experts, row.active: self.active}
        kept |= {**row.config, **row.settings(dense), **self._shared_settings(width)}
        kept |= dense_layers(row, [number for number in range(count) if not self._is_meant(number)], count)
        return {**kept, "architectures": [row.architecture], "model_type": row.model_type}

    def _shared_settings(self, width: int) -> dict[str, int]:
        shared = self._row.shared
        if shared is None or shared.setting is None:
            return {}
        copies = self.granularity if self._shares_dense else 0 if shared.optional else 1
        return {shared.setting: copies if shared.counts else copies * width // self.granularity}


def _fused(layer: str, row: ExpertClass, experts: list[Matrices]) -> Iterator[Target]:
    """All experts' matrices as two tensors, gate and up of each expert one after the other in the first."""
    (width, hidden), count = experts[0][0].shape, len(experts)
    first, last = (f"{layer}.{row.expert.format(part=row.parts[place])}" for place in (0, 2))
    yield joined(first, (count, 2 * width, hidden), [matrix for expert in experts for matrix in expert[:2]])
    yield joined(last, (count, hidden, width), [expert[2] for expert in experts])


def _zeros(name: str, shape: Iterable[int], dtype: torch.dtype) -> Target:
    sizes = tuple(shape)
    return made(name, sizes, dtype, (), lambda: torch.zeros(sizes, dtype=dtype))


def _computing_type(matrix: Target) -> torch.dtype:
    if matrix.dtype not in FLOAT_TYPES:
        raise PlanError(
            f"experts cannot read {matrix.name!r}, which has the type {matrix.dtype}: dequantise the model first, "
            "with the tool that quantised it"
        )
    return FLOAT_TYPES[matrix.dtype]
