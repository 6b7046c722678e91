"""The Triton kernels on an NVIDIA GPU: checked against float64, then timed against SDPA and flash-linear-attention.

python benchmarks/kernels.py --lengths 1024 4096 16384
python benchmarks/kernels.py --skip-verify --time-limit 540
"""

import functools
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import kernels_check as work
from common import parser_of, write_result
from kernels_check import Roofs, Shape, Work

LENGTHS = [2**power for power in range(10, 18)]
# Median, lower and upper quantile, in milliseconds.
Measure = Callable[[Callable[[], object]], tuple[float, float, float]]
# What runs, on what, what it takes at least, and a function that makes the call.
Case = tuple[str, Shape, Work, Callable[[], Callable[[], object]]]


def parser() -> Any:
    """The options."""
    found = parser_of(__doc__)
    found.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens; default 1k to 128k")
    found.add_argument("--decode-batches", type=int, nargs="*", default=[1, 32, 256], help="rows of a decoding step")
    found.add_argument("--context", type=int, default=8192, help="cached tokens that SDPA decodes against")
    found.add_argument("--heads", type=int, default=32)
    found.add_argument("--kv-heads", type=int, default=8)
    found.add_argument("--head-dim", type=int, default=128)
    found.add_argument("--window", type=int, default=64)
    found.add_argument("--skip-verify", action="store_true", help="time without checking first")
    found.add_argument("--verify-only", action="store_true", help="check and write a result without times")
    found.add_argument("--time-limit", type=float, default=540, help="seconds; cases that start later are left out")
    return found


def find_gpu() -> Any:
    """The GPU; without one that the kernels run on, the script ends with a sentence."""
    import torch

    from attnconv.attention_modules.kernels.selection import gpu_problem

    if not torch.cuda.is_available():
        sys.exit("This benchmark needs an NVIDIA GPU, and torch sees none here.")
    device = torch.device("cuda", torch.cuda.current_device())
    problem = gpu_problem(device)
    if problem is not None:
        sys.exit(f"This benchmark cannot run here: {problem}.")
    return device


def measure(function: Callable[[], object]) -> tuple[float, float, float]:
    """Time on the device, with its cache cleared before every call."""
    from triton.testing import do_bench

    return tuple(do_bench(function, quantiles=[0.5, 0.2, 0.8]))


def measure_roofs(device: Any) -> Roofs:
    """A product of two 8,192 x 8,192 matrices in bf16, and a copy of 1 GiB."""
    import torch

    left, right = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    source = torch.empty(2**30, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    product, copy = measure(lambda: left @ right)[0], measure(lambda: target.copy_(source))[0]
    return Roofs(2 * 8192**3 / product * 1e3, 2 * 2**30 / copy * 1e3)


def draw(shape: Shape, device: Any, *, tokens: int | None = None, gradients: bool = False) -> list[Any]:
    """Query, key and value in bf16."""
    import torch

    sizes = [(shape.batch, heads, tokens or shape.length, shape.head_dim) for heads in (shape.heads, shape.kv_heads)]
    kind = {"device": device, "dtype": torch.bfloat16, "requires_grad": gradients}
    return [torch.randn(size, **kind) for size in (sizes[0], sizes[1], sizes[1])]


def call(attend: Callable[..., Any], tensors: list[Any], *, backward: bool) -> Callable[[], object]:
    """A forward pass, or one with gradients."""
    import torch

    upstream = torch.randn_like(tensors[0])

    def both() -> None:
        for tensor in tensors:
            tensor.grad = None
        out = attend(*tensors)
        out.backward(upstream.to(out.dtype))

    return both if backward else torch.no_grad()(lambda: attend(*tensors))


def flash(query: Any, key: Any, value: Any, *, causal: bool = True) -> Any:
    """SDPA on its flash backend."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)


@functools.cache
def module_of(method: str, shape: Shape, device: Any) -> Any:
    """An attention module with the shape's heads."""
    from attnconv.attention_modules import Geometry, create

    geometry = Geometry(shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim)
    options = {"window": shape.window} if method == "lolcats" else {}
    return create(method, geometry, implementation="triton", **options).to(device)


def simple_gla(query: Any, key: Any, value: Any, gates: Any) -> Any:
    """flash-linear-attention's operator with a gate per head and token, in its layout `[batch, seq, heads, dim]`."""
    from fla.ops.simple_gla import chunk_simple_gla

    rows = (t.transpose(1, 2) for t in (query, key, value))
    return chunk_simple_gla(*rows, g=gates.transpose(1, 2), scale=1.0)[0].transpose(1, 2)


def chunked(query: Any, key: Any, value: Any, gates: Any) -> Any:
    """Ours, the same."""
    from attnconv.attention_modules.kernels.chunk_linear.forward import chunk_linear

    return chunk_linear(query, key, value, log_gates=gates, implementation="triton")[0][0]


def gather(query: Any, key: Any, value: Any) -> Any:
    """Softmax over blocks chosen by chance, every KV head its own."""
    from attnconv.attention_modules.kernels.block_gather.gather import block_gather

    shape = Shape(query.shape[0], query.shape[2], query.shape[1], key.shape[1], query.shape[3])
    indices = blocks_by_chance(shape, query.device)
    return block_gather(query, key, value, indices, scaling=shape.head_dim**-0.5, block=work.BLOCK)[0]


@functools.cache
def blocks_by_chance(shape: Shape, device: Any) -> Any:
    """`[batch, kv_heads, query_blocks, chosen]`: the own block and others before it, each once."""
    import torch

    rows, others = -(-shape.length // work.BLOCK), work.chosen_blocks(shape.length) - 1
    own = torch.arange(rows, device=device)
    ranked = torch.rand(shape.batch, shape.kv_heads, rows, rows, device=device)
    ranked = ranked.masked_fill(own >= own[:, None], -1.0)
    best = ranked.topk(min(others, rows), -1)
    return torch.cat([own[:, None].expand(*ranked.shape[:3], 1), best.indices.masked_fill(best.values < 0, -1)], -1)


def sequence_cases(shape: Shape, device: Any, *, has_fla: bool) -> Iterator[Case]:
    """Whole sequences, forward and with gradients."""
    import torch

    scaling = shape.head_dim**-0.5

    def hybrid(*tensors: Any) -> Any:
        return module_of("lolcats", shape, device)(*tensors, scaling=scaling)

    # As many key heads as query heads, which is all that the other operator takes.
    equal = Shape(**{**vars(shape), "kv_heads": shape.heads})
    gates = -torch.rand(shape.batch, shape.heads, shape.length, device=device)
    contestants = [("sdpa", shape, work.softmax_work, flash), ("lolcats", shape, work.hybrid_work, hybrid)]
    contestants += [(f"block gather, {work.SHARE:.0%} of blocks", shape, work.gather_work, gather)]
    contestants += [("gated linear", equal, work.linear_work, functools.partial(chunked, gates=gates))]
    if has_fla:
        contestants += [("fla simple_gla", equal, work.linear_work, functools.partial(simple_gla, gates=gates))]
    for backward in (False, True):
        for name, size, count, attend in contestants:

            def make(size: Shape = size, attend: Any = attend, backward: bool = backward) -> Callable[[], object]:
                return call(attend, draw(size, device, gradients=backward), backward=backward)

            passes = "forward and backward" if backward else "forward"
            yield f"{name}, {passes}", size, count(size, backward=backward), make


def decode_cases(shape: Shape, device: Any) -> Iterator[Case]:
    """One token of every row."""
    import torch

    def cached() -> Callable[[], object]:
        (query, *_), (_, key, value) = draw(shape, device, tokens=1), draw(shape, device)
        return lambda: flash(query, key, value, causal=False)

    def hybrid() -> Callable[[], object]:
        module = module_of("lolcats", shape, device)
        state, new = module.new_state(), draw(shape, device, tokens=1)
        decode = torch.no_grad()(functools.partial(module, scaling=shape.head_dim**-0.5, state=state))
        decode(*draw(shape, device, tokens=2 * shape.window))
        return functools.partial(decode, *new)

    yield "sdpa, decode", shape, work.softmax_decode_work(shape), cached
    yield "lolcats, decode", shape, work.hybrid_decode_work(shape), hybrid


def time_cases(cases: Iterator[Case], roofs: Roofs, deadline: float, measured: Measure) -> list[dict[str, Any]]:
    """A row for every case, also for those for which memory or time were too short, which say so."""
    import torch

    rows = []
    for name, shape, least, make in cases:
        missing = {"name": name, "batch": shape.batch, "length": shape.length}
        if time.monotonic() > deadline:
            rows.append({**missing, "left_out": "time limit"})
            continue
        try:
            rows.append(work.row(name, shape, least, roofs, measured(make())))
        except torch.cuda.OutOfMemoryError:
            rows.append({**missing, "left_out": "out of memory"})
        print(rows[-1])
    return rows


def verify(device: Any, deadline: float) -> list[dict[str, Any]]:
    """Every kernel on this device against float64; what is wrong ends the script, for its times mean nothing."""
    rows = []
    for case in work.check_cases([*work.TOLERANCES], [64, 128], [1, 63, 333]):
        if time.monotonic() > deadline:
            break
        rows.append(work.check(*case, device=device))
    wrong = [row for row in rows if not row["passed"]]
    for row in wrong:
        print(row)
    if wrong:
        sys.exit(f"{len(wrong)} of {len(rows)} checks against float64 failed, so nothing is timed.")
    return rows


def installed(package: str) -> str | None:
    """A package's version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    """Check, time and write."""
    arguments = parser().parse_args()
    deadline = time.monotonic() + arguments.time_limit
    device = find_gpu()
    import torch

    checks = [] if arguments.skip_verify else verify(device, deadline)
    roofs, rows = measure_roofs(device), []
    sizes = {name: getattr(arguments, name) for name in ("heads", "kv_heads", "head_dim", "window")}
    fla = installed("flash-linear-attention") or installed("fla-core")
    if not arguments.verify_only:
        for batch in arguments.decode_batches:
            rows += time_cases(decode_cases(Shape(batch, arguments.context, **sizes), device), roofs, deadline, measure)
        for length in arguments.lengths:
            cases = sequence_cases(Shape(1, length, **sizes), device, has_fla=fla is not None)
            rows += time_cases(cases, roofs, deadline, measure)
    properties = torch.cuda.get_device_properties(device)
    settings = {**sizes, "dtype": "bfloat16", "triton": installed("triton"), "flash-linear-attention": fla}
    settings |= {"gpu_memory_bytes": properties.total_memory, "capability": f"{properties.major}.{properties.minor}"}
    results = {"checks": checks, "checks_planned": 0 if arguments.skip_verify else len(work.VARIANTS) * 18}
    results |= {"roofs": vars(roofs), "times": rows}
    write_result("kernels", settings=settings, results=results, label=arguments.label)


if __name__ == "__main__":
    main()
