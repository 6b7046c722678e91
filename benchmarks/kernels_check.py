"""What `kernels.py` counts and checks: work of each method, shares of roofs, and kernels against float64 oracles."""

import itertools
from dataclasses import dataclass
from typing import Any

# Relative to the largest number of the oracle, or to 1 where all are smaller. Gradients may be off by twice as much:
# those of maps are differences of rounded features, and 2.1e-2 was seen in bf16 with interpreted kernels.
TOLERANCES = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lolcats": ("lolcats", {"window": 64}),
    "lolcats, state per kv head": ("lolcats", {"window": 16, "state_per": "kv_head"}),
    "lolcats, features mapped before": ("lolcats", {"window": 64, "feature_map": "elu"}),
    "hedgehog": ("hedgehog", {}),
    "lightning": ("lightning", {}),
    "gated, a gate per head": ("gated", {"gate": "scalar"}),
    "gated_delta": ("gated_delta", {}),
    "xattention": ("xattention", {"block": 64, "mass": 0.6}),
    "strided, small blocks": ("strided", {"block": 16, "local_blocks": 1, "stride": 3}),
}
# Of the timed gather of blocks: tokens of one, and the share of a sequence's blocks that a block of queries attends.
BLOCK, SHARE = 64, 0.1


@dataclass(frozen=True)
class Shape:
    """One call: sizes, and bytes of a number."""

    batch: int
    length: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    window: int = 64
    itemsize: int = 2

    @property
    def read_and_written(self) -> int:
        """Bytes of query, key, value and output, once each."""
        return 2 * self.batch * self.length * (self.heads + self.kv_heads) * self.head_dim * self.itemsize

    @property
    def state_bytes(self) -> int:
        """Bytes of the hybrid's fp32 sums of all rows, a state for every query head."""
        return self.batch * self.heads * 2 * self.head_dim * (self.head_dim + 1) * 4

    @property
    def ring_bytes(self) -> int:
        """Bytes of the hybrid's exact tokens."""
        return 2 * self.batch * self.kv_heads * self.window * self.head_dim * self.itemsize


@dataclass(frozen=True)
class Work:
    """The least that a computation takes, whatever the implementation: operations, and bytes to and from memory."""

    flops: float
    num_bytes: float

    def seconds(self, roofs: "Roofs") -> float:
        """The time that memory or arithmetic alone would take, whichever is longer."""
        return max(self.flops / roofs.flops_per_second, self.num_bytes / roofs.bytes_per_second)


@dataclass(frozen=True)
class Roofs:
    """What the device reached in this run: a large bf16 product and a large copy."""

    flops_per_second: float
    bytes_per_second: float


def softmax_work(shape: Shape, *, backward: bool = False) -> Work:
    """Causal softmax attention: two products over half of all pairs; their gradients are five more."""
    products = 2 + (5 if backward else 0)
    flops = products * shape.batch * shape.heads * shape.length**2 * shape.head_dim
    return Work(flops, shape.read_and_written * (3 if backward else 1))


def chosen_blocks(length: int) -> int:
    """Blocks that a block of queries attends in the timed gather, its own included, if so many are before it."""
    return max(1, round(SHARE * length / BLOCK))


def gather_work(shape: Shape, *, backward: bool = False) -> Work:
    """Softmax over the chosen blocks, of each block's own one half; the same products as dense attention."""
    most, products = chosen_blocks(shape.length), 2 + (5 if backward else 0)
    pairs = sum(min(most, row + 1) - 0.5 for row in range(-(-shape.length // BLOCK))) * BLOCK**2
    flops = 2 * products * shape.batch * shape.heads * pairs * shape.head_dim
    return Work(flops, shape.read_and_written * (3 if backward else 1))


def hybrid_work(shape: Shape, *, backward: bool = False) -> Work:
    """The hybrid as a recurrence: a window, two maps, and a state of `2 head_dim x head_dim` added to and read."""
    per_token = 4 * min(shape.window, shape.length) + 4 * shape.head_dim + 8 * shape.head_dim
    flops = shape.batch * shape.length * shape.heads * shape.head_dim * per_token * (3.5 if backward else 1)
    return Work(flops, shape.read_and_written * (3 if backward else 1))


def linear_work(shape: Shape, *, backward: bool = False) -> Work:
    """A state of `head_dim x head_dim`, added to and read."""
    flops = 4 * shape.batch * shape.length * shape.heads * shape.head_dim**2 * (3 if backward else 1)
    return Work(flops, shape.read_and_written * (3 if backward else 1))


def softmax_decode_work(shape: Shape) -> Work:
    """One token of every row against `length` cached ones, which are read once."""
    cache = 2 * shape.batch * shape.kv_heads * shape.length * shape.head_dim * shape.itemsize
    return Work(4 * shape.batch * shape.heads * shape.length * shape.head_dim, cache)


def hybrid_decode_work(shape: Shape) -> Work:
    """One token of every row: sums are read and written, the ring is read; no term depends on the length."""
    per_head = shape.head_dim * (4 * shape.window + 4 * shape.head_dim + 8 * shape.head_dim)
    return Work(shape.batch * shape.heads * per_head, 2 * shape.state_bytes + shape.ring_bytes)


def row(name: str, shape: Shape, work: Work, roofs: Roofs, milliseconds: tuple[float, float, float]) -> dict[str, Any]:
    """A result: median and 20 % and 80 % quantiles, with what was reached of what the device can do.

    Args:
        name: what ran.
        shape: on what.
        work: what it takes at least.
        roofs: of the device.
        milliseconds: median, lower and upper quantile.
    """
    median, low, high = milliseconds
    return {
        "name": name,
        "batch": shape.batch,
        "length": shape.length,
        "ms": median,
        "ms_20": low,
        "ms_80": high,
        "tflops_per_second": work.flops / median / 1e9,
        "gigabytes_per_second": work.num_bytes / median / 1e6,
        "share_of_roof": 1e3 * work.seconds(roofs) / median,
    }


def check_cases(dtypes: list[str], head_dims: list[int], lengths: list[int]) -> list[tuple[str, str, int, int]]:
    """All that is checked: variant, dtype, head_dim and length."""
    return list(itertools.product(VARIANTS, dtypes, head_dims, lengths))


def check(variant: str, dtype_name: str, head_dim: int, length: int, device: str) -> dict[str, Any]:
    """Errors of outputs and of every gradient of a padded call, and of 5 tokens decoded after it, against float64."""
    import torch

    from attnconv.attention_modules import Geometry, create

    dtype, (method, options) = getattr(torch, dtype_name), VARIANTS[variant]
    geometry = Geometry(4, 2, head_dim, head_dim, hidden_size=32)
    torch.manual_seed(length)
    shapes = [(2, 4, length + 5, head_dim), *[(2, 2, length + 5, head_dim)] * 2, (2, 1, length + 5, 32)]
    drawn = [torch.randn(shape).to(dtype) for shape in shapes]
    weight, mask = torch.randn(shapes[0]), torch.ones(2, length + 5, dtype=torch.bool)
    mask[0, : length // 3] = False
    found: list[dict[str, torch.Tensor]] = []
    for kind, exact in (("triton", dtype), ("naive", torch.float64)):
        torch.manual_seed(1)
        module = create(method, geometry, implementation=kind, **options)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        module = module.to(dtype).to(device=device, dtype=torch.float32 if kind == "triton" else exact)
        inputs = [t.to(device, exact, copy=True).requires_grad_() for t in drawn]

        def call(start: int, stop: int, state: Any = None, module: Any = module, inputs: Any = inputs) -> torch.Tensor:
            *heads, hidden = (t[:, :, start:stop] for t in inputs)
            valid, hidden = mask[:, start:stop].to(device), hidden.squeeze(1)
            scaling = head_dim**-0.5
            return module(*heads, scaling=scaling, padding_mask=valid, state=state, hidden_states=hidden)

        out = call(0, length)
        (out.float() * weight[:, :, :length].to(device)).sum().backward()
        leaves = dict(zip(("query", "key", "value", "hidden"), inputs, strict=True)) | dict(module.named_parameters())
        results = {"out": out} | {f"d {name}": t.grad for name, t in leaves.items() if t.grad is not None}
        state = module.new_state()
        with torch.no_grad():
            call(0, length, state)
            results["decoded"] = torch.cat([call(t, t + 1, state) for t in range(length, length + 5)], 2)
        found.append({name: t.detach().double().cpu() for name, t in results.items()})
    errors = {
        name: float((found[0][name] - t).abs().max() / t.abs().max().clamp_min(1.0))
        for name, t in found[1].items()
        if name in found[0]
    }
    worst = max(errors, key=lambda name: errors[name])
    allowed = {name: TOLERANCES[dtype_name] * (2 if name.startswith("d ") else 1) for name in errors}
    passed = errors.keys() == found[1].keys() and all(error < allowed[name] for name, error in errors.items())
    names = {"variant": variant, "dtype": dtype_name, "head_dim": head_dim, "length": length}
    return {**names, "passed": passed, "worst": worst, "error": errors[worst]}
