"""Attention with key/value heads as multi-head latent attention, in the DeepSeek-V3 class of transformers."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ...errors import PlanError
from .attention_classes import QKVO, redressed, with_defaults
from .latent_layer import LatentSizes, latent_layer, layer_components, rotary_components
from .moments import Moments
from .pooling import check_rotary
from .projections import AttentionStep, floating
from .tensors import Target, made

FIXED_ROPES = ("default", "linear", "llama3")
"""Rotary embeddings whose frequencies are the same at every length."""
DENSE = {
    "q_lora_rank": None,
    "n_routed_experts": 1,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "num_mtp_layers": 0,
}
"""What a DeepSeek-V3 without experts says of them."""


class Latent(AttentionStep):
    """Keep of a token's keys and values one latent of fewer numbers, from which all heads are made.

    The key components that rotation matters for most stay rotary and are shared by all heads; the rest of the keys,
    which nothing rotates any more, and the values go into the latent. With as many numbers as there were nothing is
    lost: each rotary pair has a frequency of its own, and one more number of the latent, held at a large constant by a
    bias, keeps the class's norm from changing the others.

    Args:
        numbers: numbers of a token and layer, rotary and latent; None = as many as the source's heads have, and one.
        rotary: how many of them are rotated; None = a quarter, or all keys if `numbers` is None.
        constant: whether there is the constant; without it rotary embedding and projections are the plain ones that
            engines read, and each latent is off by its length.
        key_weight: how much heavier an error in keys weighs than one in values.
    """

    kind = "latent"

    def __init__(
        self,
        *,
        numbers: int | None = None,
        rotary: int | None = None,
        constant: bool = True,
        key_weight: float = 3.0,
    ) -> None:
        super().__init__()
        self.numbers = numbers
        self.rotary = rotary
        self.constant = constant
        self.key_weight = key_weight
        self._moments: Moments | None = None
        self._layers: dict[int, Mapping[str, Target]] = {}
        self._kept: Tensor | None = None
        self._frequencies = torch.zeros(0)
        self._made: tuple[int, dict[str, Tensor]] | None = None

    @property
    def summary(self) -> str:
        many = "as many numbers as before" if self.numbers is None else f"{self.numbers} numbers"
        return f"keys and values kept as a latent of {many} for each token and layer"

    @property
    def inexact(self) -> str | None:
        if not self.constant:
            return "latents divided by their length, and keys rotated in part"
        if self.numbers is not None or self.rotary is not None:
            return "keys and values kept in fewer numbers, or rotated in part"
        return None

    def check(self, config: Mapping[str, Any]) -> None:
        super().check(config)
        full = with_defaults(config)
        rope = dict(full.get("rope_parameters") or {})
        kind = rope.get("rope_type", "default")
        windows = "sliding_attention" in (full.get("layer_types") or ()) or (
            self.row.model_type == "mistral" and full.get("sliding_window") is not None
        )
        biased = [key for key in ("attention_bias", "mlp_bias") if full.get(key)]
        biased += ["of queries and keys"] if self.row.model_type.startswith("qwen2") else []
        dense = ("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3")
        reasons = {
            f"of a {self.row.model_type} model, whose feed-forwards are experts": self.row.model_type not in dense,
            f"with biases ({', '.join(biased)}), which DeepSeek-V3 has no place for": biased,
            "with a sliding window, which DeepSeek-V3 does not have": windows,
            f"with the rotary embedding {kind}, whose frequencies depend on the length": kind not in FIXED_ROPES,
            f"with the rotary embedding {kind}, for which it needs the constant: leave constant: false out": (
                not self.constant and kind != "default"
            ),
        }
        for reason, given in reasons.items():
            if given:
                raise PlanError(f"latent cannot rewrite attention {reason}")
        check_rotary(self, config)
        self._check_numbers()
        self._frequencies = _frequencies(config, kind)

    def _check_numbers(self) -> None:
        heads = self.heads
        most = 2 * heads.kv * heads.dim
        numbers, rotary = self._total, self._rotary
        if numbers > most + self.constant:
            raise PlanError(
                f"latent is to keep {numbers} numbers of a token in each layer, and its {heads.kv} key/value heads "
                f"have {most}: give fewer, or none to lose nothing"
            )
        if rotary % 2 or not 2 <= rotary <= heads.kv * heads.dim or numbers - rotary - self.constant < 1:
            raise PlanError(
                f"latent cannot rotate {rotary} of {numbers} numbers: an even number from 2 to "
                f"{min(heads.kv * heads.dim, numbers - 1 - self.constant)} can be"
            )
        if not self.constant and rotary != heads.dim:
            raise PlanError(
                f"latent without the constant rotates as many numbers as a head has, {heads.dim}, and not {rotary}: "
                "leave rotary out"
            )

    @property
    def _total(self) -> int:
        return 2 * self.heads.kv * self.heads.dim + self.constant if self.numbers is None else self.numbers

    @property
    def _rotary(self) -> int:
        if self.rotary is not None:
            return self.rotary
        if not self.constant:
            return self.heads.dim
        return self.heads.kv * self.heads.dim if self.numbers is None else max(2, self.numbers // 8 * 2)

    def settle(self, moments: Moments) -> None:
        self._moments = moments
        self._kept = None

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """DeepSeek-V3's, without experts."""
        heads, sizes, full = self.heads, self._sizes(), with_defaults(config)
        theta = full["rope_parameters"]["rope_theta"]
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        if self.constant:
            factors = _factors(theta, self._frequencies.repeat_interleave(sizes.kept))
            rope |= {
                "rope_type": "longrope",
                "factor": 1.0,
                "attention_factor": 1.0,
                "short_factor": factors,
                "long_factor": factors,
                "original_max_position_embeddings": full["max_position_embeddings"],
            }
        return redressed(
            config,
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            **DENSE,
            first_k_dense_replace=heads.layers,
            num_key_value_heads=heads.query,
            kv_lora_rank=sizes.latent,
            qk_rope_head_dim=sizes.rotary,
            qk_nope_head_dim=heads.dim,
            v_head_dim=heads.dim,
            head_dim=sizes.rotary,
            qk_head_dim=heads.dim + sizes.rotary,
            attention_bias=self.constant,
            rope_interleave=not self.constant,
            rope_parameters=rope,
        )

    def layer(self, index: int, tensors: Mapping[str, Target]) -> Iterable[Target]:
        self._layers[index] = tensors
        self._made = None
        heads, output = self.heads, tensors["o_proj.weight"]
        rotary, latent = self._rotary, self._total - self._rotary
        prefix = output.name.removesuffix("o_proj.weight")
        shapes: dict[str, tuple[int, ...]] = {
            "q_proj.weight": (heads.query * (heads.dim + rotary), heads.hidden),
            "kv_a_proj_with_mqa.weight": (latent + rotary, heads.hidden),
            "kv_a_layernorm.weight": (latent,),
            "kv_b_proj.weight": (heads.query * 2 * heads.dim, latent),
        }
        if self.constant:
            shapes["kv_a_proj_with_mqa.bias"] = (latent + rotary,)
        of = tuple(tensors[f"{name}.weight"] for name in QKVO)
        for part, shape in shapes.items():
            dtype = floating(tensors["k_proj.weight"], self.kind)
            yield made(f"{prefix}{part}", shape, dtype, of, self._function(index, part, dtype))
        yield output
        if self.constant:
            dtype = floating(output, self.kind)
            zeros = torch.zeros(heads.hidden, dtype=dtype)
            yield made(f"{prefix}o_proj.bias", (heads.hidden,), dtype, (), lambda: zeros)

    def _function(self, index: int, part: str, dtype: torch.dtype) -> Callable[..., Tensor]:
        def make(*weights: Tensor) -> Tensor:
            # All tensors of a layer are made at once, and asked for one after another.
            if self._made is None or self._made[0] != index:
                four = (weights[0], weights[1], weights[2], weights[3])
                self._made = index, latent_layer(four, self._second(index), self._sizes(), self.key_weight)
            rounded = self._made[1][part].to(dtype)
            if not bool(rounded.isfinite().all()):
                raise PlanError(
                    f"latent's constant is too large for {str(dtype).removeprefix('torch.')}: cast the model to "
                    "bfloat16 or float32 first"
                )
            return rounded

        return make

    def _second(self, index: int) -> Tensor:
        if self._moments is not None:
            return self._moments[index].second
        if self.inexact is not None:
            raise PlanError(
                "latent leaves something out and does not know how large keys and values are: settle it first, in a "
                "recipe by calibrate"
            )
        # Where nothing is left out it does not matter which directions are large.
        return torch.eye(self.heads.hidden, dtype=torch.float64)

    def _sizes(self) -> LatentSizes:
        heads = self.heads
        if self._kept is None:
            self._kept = self._settled_pairs()
        rank = self._total - self._rotary - self.constant
        return LatentSizes(heads.query, heads.kv, heads.dim, self._kept, rank, self.constant, not self.constant)

    def _settled_pairs(self) -> Tensor:
        """How many components of each frequency stay rotary."""
        heads, pairs = self.heads, self.heads.dim // 2
        if not self.constant:
            return torch.ones(pairs, dtype=torch.long)
        if self._rotary == heads.kv * heads.dim:
            return torch.full((pairs,), heads.kv)
        if self._moments is None:
            # Before the model is measured only how many there are in all is known.
            spread = torch.arange(self._rotary // 2) % pairs
            return torch.bincount(spread, minlength=pairs)
        energies = []
        for index in range(heads.layers):
            query, key = (self._layers[index][f"{name}.weight"].read() for name in ("q_proj", "k_proj"))
            energies.append(layer_components(query, key, (heads.query, heads.kv), self._second(index)).energies)
        return rotary_components(torch.stack(energies), self._frequencies, self._rotary // 2)


def _frequencies(config: Mapping[str, Any], kind: str) -> Tensor:
    """`[head_dim / 2]`: radians for each position, as the model's class has them."""
    read = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    if kind != "default":
        return ROPE_INIT_FUNCTIONS[kind](read, torch.device("cpu"))[0].double()
    dim = read.head_dim or read.hidden_size // read.num_attention_heads
    return (1 / _powers(float(read.rope_parameters["rope_theta"]), dim)).double()


def _powers(theta: float, dim: int) -> Tensor:
    """`[dim / 2]`: what a rotary embedding without factors divides 1 by, in float32 as classes compute it."""
    return torch.as_tensor(theta ** (torch.arange(0, dim, 2).float() / dim))


def _factors(theta: float, wanted: Tensor) -> list[float]:
    """What longrope is to divide its frequencies by, so that those wanted come out of its float32.

    At distant positions the least difference between frequencies would be larger than all that rounding does.
    """
    powers = _powers(theta, 2 * len(wanted))
    nearest = (1 / (wanted * powers)).float()
    up, down = (nearest.nextafter(torch.tensor(end)) for end in (torch.inf, 0.0))
    around = torch.stack([nearest, up, down])
    off = (1 / (around * powers) - wanted).abs()
    return [float(factor) for factor in around.gather(0, off.argmin(0)[None])[0]]
