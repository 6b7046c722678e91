"""What the Triton kernels take of a GPU, read from code compiled for it; no GPU is needed, and nothing is timed.

python benchmarks/kernels_static.py --targets 80 90 100 --head-dims 64 128

With `--update` rows of other operators, sizes, dtypes and targets stay as they were measured; each names its commit
and its Triton.
"""

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common import RESULTS, commit_state, parser_of, set_threads, write_result

# Shared memory that one block of threads may ask for, in bytes.
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
OPERATORS = ["linear", "gated", "packed", "vector", "delta", "hybrid", "fused", "decode", "blocks", "blocks-decode"]
OPERATORS += ["hybrid-absolute", "fused-absolute", "decode-absolute", "pooled-largest", "pooled-mass", "pooled-each"]
DTYPES = ("bfloat16", "float16", "float32")
HEADS, KV_HEADS, TOKENS, WINDOW, BLOCK = 4, 2, 256, 64, 64


@dataclass(frozen=True)
class Case:
    """One operator's tensors.

    `linear` is hedgehog's, `gated` has a gate per token, `packed` several such sequences in one row, `vector` a gate
    for each channel, `delta` is the gated delta rule, `blocks` softmax over chosen blocks of keys, of sequences and of
    one token; `pooled` is attention pooled over blocks, of a block of queries or of each; the others are those of
    LoLCATs, with softmax terms relative to the largest of each window or absolute.
    """

    operator: str
    head_dim: int
    dtype: str


def record(case: Case, target: int):
    """The launches that a case would make: kernel, arguments, constants, warps and stages."""
    import torch

    from attnconv.attention_modules.kernels import launching
    from attnconv.attention_modules.kernels.block_gather import decode as decode_gather
    from attnconv.attention_modules.kernels.block_gather import gather
    from attnconv.attention_modules.kernels.chunk_linear import backward as chunk_linear_backward
    from attnconv.attention_modules.kernels.chunk_linear import forward as chunk_linear
    from attnconv.attention_modules.kernels.chunk_linear import layout
    from attnconv.attention_modules.kernels.decode_step import decode
    from attnconv.attention_modules.kernels.delta_rule import backward as delta_rule_backward
    from attnconv.attention_modules.kernels.delta_rule import forward as delta_rule
    from attnconv.attention_modules.kernels.pooled_map import pooled
    from attnconv.attention_modules.kernels.window_linear import fused, hybrid

    launches = []

    def keep(kernel, grid, arguments, constants, *, num_warps=4, num_stages=2):
        launches.append((kernel, dict(arguments), dict(constants), num_warps, num_stages))

    linear = chunk_linear, chunk_linear_backward, delta_rule, delta_rule_backward, layout
    for module in (*linear, decode, fused, hybrid, gather, decode_gather, pooled):
        module.launch = keep
    dtype, head_dim = getattr(torch, case.dtype), case.head_dim
    query, key = (torch.zeros(1, heads, TOKENS, head_dim, dtype=dtype) for heads in (HEADS, KV_HEADS))
    start, gates = torch.zeros(1, dtype=torch.int32), torch.zeros(1, KV_HEADS, TOKENS)
    chunk = layout.VECTOR_CHUNK if case.operator == "vector" else launching.default_chunk(dtype)
    narrow = case.operator in ("gated", "packed", "vector", "delta")
    features = [t if narrow else torch.cat([t, t], -1) for t in (query, key)]
    memory = torch.zeros(1, KV_HEADS, features[0].shape[-1], head_dim), torch.zeros(1, KV_HEADS, features[0].shape[-1])
    operator, _, terms = case.operator.partition("-")
    absolute = terms == "absolute"
    if operator == "decode":
        ring = torch.zeros(1, KV_HEADS, WINDOW, head_dim, dtype=dtype)
        valid = torch.ones(1, 1, dtype=torch.bool)
        weights = (torch.zeros(heads, head_dim, head_dim, dtype=dtype) for heads in (HEADS, KV_HEADS))
        new = query[:, :, :1], key[:, :, :1], key[:, :, :1]
        state = *new, ring, ring.clone(), *memory, *weights, torch.zeros(HEADS), start.long(), valid
        torch.ops.attnconv.decode_step(*state, 1.0, absolute)
    elif operator == "fused":
        weights = (torch.zeros(heads, head_dim, head_dim, dtype=dtype) for heads in (HEADS, KV_HEADS))
        sizes = 1.0, WINDOW, fused.fused_chunk(query, key, target // 10)
        shared = query, key, key, *weights, torch.zeros(HEADS), start, *memory
        torch.ops.attnconv.hedgehog_window_linear(*shared, *sizes, True, absolute)
    elif operator == "hybrid":
        sizes = 1.0, WINDOW, hybrid.hybrid_chunk(query, key)
        shared = query, key, key, *features, torch.zeros(HEADS), start, *memory
        out, _, mass, peak, best = torch.ops.attnconv.hybrid_window_linear(*shared, *sizes, True, absolute)
        launches.pop(0)
        torch.ops.attnconv.window_gradients(query, key, key, torch.zeros(HEADS), start, out, mass, peak, best, *sizes)
    elif case.operator == "blocks-decode":
        indices = torch.zeros(1, KV_HEADS, 1, TOKENS // BLOCK, dtype=torch.int32)
        torch.ops.attnconv.decode_blocks(query[:, :, :1], key, key, indices, start, 1.0, BLOCK)
    elif operator == "blocks":
        indices = torch.zeros(1, KV_HEADS, TOKENS // BLOCK, 2, dtype=torch.int32)
        shared, sizes = (query, key, key, indices, start), (1.0, BLOCK)
        out, level = torch.ops.attnconv.block_gather(*shared, *sizes)
        torch.ops.attnconv.block_gather_gradients(*shared, level, out, level, *sizes)
    elif operator == "pooled":
        together = 1 if terms == "each" else BLOCK
        sizes = 1.0, BLOCK, pooled._tile(together, dtype), 0, terms == "largest"
        torch.ops.attnconv.pooled_map(query, key, *sizes)
    elif case.operator == "delta":
        shared = query, key, key, gates, gates, start, memory[0]
        out, last = torch.ops.attnconv.delta_rule(*shared, chunk)
        torch.ops.attnconv.delta_rule_gradients(*shared, out, last, chunk)
    else:
        cu_seqlens = torch.tensor([0, TOKENS], dtype=torch.int32) if case.operator == "packed" else None
        decays = {"linear": None, "vector": torch.zeros(1, KV_HEADS, TOKENS, head_dim)}
        shared = *features, key, decays.get(case.operator, gates), start, *memory
        out, mass, *last = torch.ops.attnconv.chunk_linear(*shared, chunk, cu_seqlens)
        torch.ops.attnconv.chunk_linear_gradients(*shared, out, mass, *last, 0, chunk, cu_seqlens)
    return list({launch[0].__name__: launch for launch in launches}.values())


def compile_for(launch, target: int):
    """The compiled kernel, with what a launch on the device would find out about its arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel, arguments, constants, num_warps, num_stages = launch
    pointers = {"torch.bfloat16": "*bf16", "torch.float16": "*fp16", "torch.float32": "*fp32", "torch.int32": "*i32"}
    pointers["torch.int64"] = "*i64"
    constants = constants | {name: None for name, value in arguments.items() if value is None}
    signature = {}
    for name in kernel.arg_names:
        value = arguments.get(name)
        if name in constants:
            signature[name] = "constexpr"
        elif hasattr(value, "dtype"):
            signature[name] = pointers[str(value.dtype)]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return compile(source, target=GPUTarget("cuda", target, 32), options=options)


def usage(compiled, target: int) -> dict[str, int]:
    """Registers of a thread, bytes that it spills, and bytes of shared memory of a block."""
    from triton.backends.nvidia.compiler import get_ptxas

    # Triton brings several; which of them reads the PTX that it writes for a target changes from release to release.
    assembler = get_ptxas(target)
    ptx = compiled.asm["ptx"]
    name = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        command = [assembler.path, "-v", f"--gpu-name={name}", path, "-o", f"{path}.cubin"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled_bytes": int(spills[1]) + int(spills[2]),
        "shared_bytes": compiled.metadata.shared,
    }


def measure(work: tuple[Case, int]) -> list[dict[str, object]]:
    """Compile all kernels of a case for one target."""
    case, target = work
    return [
        {
            "kernel": launch[0].__name__,
            "operator": case.operator,
            "head_dim": case.head_dim,
            "dtype": case.dtype,
            "target": f"sm_{target}",
            "num_warps": launch[3],
            "num_stages": launch[4],
            **usage(compile_for(launch, target), target),
            "shared_limit": SHARED_LIMITS[target],
        }
        for launch in record(case, target)
    ]


def main() -> None:
    """Compile everything and write a table."""
    parser = parser_of(__doc__)
    parser.add_argument("--targets", type=int, nargs="+", choices=SHARED_LIMITS, default=[*SHARED_LIMITS])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--operators", nargs="+", default=OPERATORS)
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--update", action="store_true", help="keep the rows of what is not compiled now")
    parser.add_argument("--check", action="store_true", help="print the table as JSON lines and write no result")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    try:
        import triton
    except ImportError:
        sys.exit("triton is missing: the kernels can be compiled on Linux x86-64 only.")
    cases = [
        (Case(operator, size, dtype), target)
        for dtype in arguments.dtypes
        for size in arguments.head_dims
        for target in arguments.targets
        for operator in arguments.operators
    ]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        rows = [row for rows in pool.map(measure, cases) for row in rows]
    if arguments.check:
        print("\n".join(json.dumps(row) for row in rows))
        return
    made = {"commit": commit_state()["commit"], "triton": triton.__version__}
    rows = [{**row, **made} for row in rows]
    recorded = RESULTS / "kernels_static.json"
    if arguments.update and recorded.is_file():
        rows = merged(json.loads(recorded.read_text(encoding="utf-8")), rows)
    settings = {"heads": HEADS, "kv_heads": KV_HEADS, "window": WINDOW, "block": BLOCK}
    path = write_result("kernels_static", settings=settings, results={"kernels": rows}, label=arguments.label)
    path.replace(recorded)


def merged(document: dict, rows: list[dict]) -> list[dict]:
    """New rows, after the recorded ones of other operators, head_dims, dtypes and targets."""
    keys = "operator", "head_dim", "dtype", "target"
    new = {tuple(row[key] for key in keys) for row in rows}
    old = document["results"]["kernels"]
    return [row for row in old if tuple(row[key] for key in keys) not in new] + rows


if __name__ == "__main__":
    main()
