"""Upcycling a checkpoint into mixtures of experts: exactness, memory and time, one row for each kind.

    python benchmarks/rewrites.py --model models/smollm2-135m-instruct

Each kind is written by a process of its own, in turns with `cp -r` of its result to the same file system, from a warm
page cache. The process reports its highest resident memory after its imports (and a rewrite of one megabyte), after
writing, and after the check of cut models that `convert` makes before it writes. Then source and result are loaded
whole, by transformers in float32, and compared: logits, and greedy text. Their logits in float64 tell the rewrite from
rounding, where there is memory for them, and `rounding` is how far the source itself is from those in float32.
`reordered` is how far it is from itself with the neurons of its feed-forwards in eight other orders, in float32: the
same function, added up otherwise.

The kinds for `qwen2_moe` are made of the Qwen2 that `--qwen2` names, whose projections of queries, keys and values have
biases. Without one they are made of the same weights written as a Qwen2 with drawn biases, a tenth as large as what
each projection gives on the prompt. With larger ones rounding alone moves logits by more than the bound. Its text is no
language, only the same twice.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from common import find_model, parser_of, peak_bytes, run_command, set_threads, write_result

EXPERTS = {"kind": "experts", "target": "mixtral"}
TO_FLOAT32 = {"kind": "cast", "dtype": "float32"}
QWEN2_MOE = {"kind": "experts", "target": "qwen2_moe", "num_experts": 4, "active": 2}
KINDS: Mapping[str, list[dict[str, Any]]] = {
    "x 4": [{**EXPERTS, "num_experts": 4, "active": 2}],
    "x 4, zero router": [{**EXPERTS, "num_experts": 4, "active": 2, "router": "zero"}],
    "x 8": [{**EXPERTS, "num_experts": 8, "active": 2}],
    "granular 2": [{**EXPERTS, "num_experts": 8, "active": 4, "granularity": 2}],
    "granular 3, in float32": [TO_FLOAT32, {**EXPERTS, "num_experts": 6, "active": 3, "granularity": 3}],
    "granular 3, rounded": [{**EXPERTS, "num_experts": 6, "active": 3, "granularity": 3}],
    "biased, shared expert": [QWEN2_MOE],
    "biased, no shared expert": [{**QWEN2_MOE, "shared": "none"}],
    "biased, zero router": [{**QWEN2_MOE, "router": "zero"}],
}
BIAS = 0.1
BIASED = ("q_proj", "k_proj", "v_proj")
PROMPT = (
    "The river had risen in the night. When they came down to the bridge in the morning, the old man was there, "
    "counting the planks that were left, and he said that nobody would cross before the water fell. What they did"
)
NEW_TOKENS = 40
REPEATED = 4
"""How often the prompt follows itself where logits are compared."""
ORDERS = 8


def rewrite(model: Path, kind: str, output: Path) -> dict[str, Any]:
    """Rewrite in this process; seconds, highest resident bytes, and the figure of the check."""
    from attnconv.convert.reading.checkpoint import open_checkpoint
    from attnconv.convert.rewriting.exactness import check_exactness
    from attnconv.convert.rewriting.plan import plan_rewrite, write_rewritten
    from attnconv.packaged.model import embedded_model_path
    from attnconv.recipes import Recipe

    def planned(source: Path, kind: str = kind) -> Any:
        steps = [step.step() for step in Recipe(name="benchmark", rewrite=KINDS[kind]).rewrite]
        return plan_rewrite(open_checkpoint(source), steps)

    # A rewrite of a megabyte imports all that the one measured does; its feed-forwards are no multiple of 3 wide.
    with tempfile.TemporaryDirectory() as tiny:
        write_rewritten(planned(embedded_model_path(), "granular 2"), Path(tiny), shard_bytes=5 * 10**9)
    found: dict[str, Any] = {"baseline_bytes": peak_bytes()}
    output.mkdir()
    began = time.perf_counter()
    write_rewritten(planned(model), output, shard_bytes=5 * 10**9)
    found |= {"seconds": time.perf_counter() - began, "writing_bytes": peak_bytes()}
    began = time.perf_counter()
    exactness = check_exactness(planned(model), allow_inexact=True)
    return found | {
        "check_seconds": time.perf_counter() - began,
        "check_bytes": peak_bytes(),
        "check": exactness.to_dict(),
    }


def write_biased(model: Path, output: Path) -> None:
    """Write a Llama as a Qwen2 with drawn biases."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model)
    llama = AutoModelForCausalLM.from_pretrained(model)
    given = llama.config.to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters")
    kept += ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype")
    qwen = Qwen2ForCausalLM(Qwen2Config(**{key: given[key] for key in kept})).to(llama.dtype)
    weights, generator = llama.state_dict(), torch.Generator().manual_seed(0)

    def draw(name: str) -> Any:
        def bias(_module: Any, _inputs: Any, out: Any) -> None:
            drawn = torch.randn(out.shape[-1], generator=generator) * BIAS * out.float().std()
            weights[f"{name}.bias"] = drawn.to(out.dtype)

        return bias

    for name, module in llama.named_modules():
        if name.endswith(BIASED):
            module.register_forward_hook(draw(name))
    with torch.no_grad():
        llama(tokenizer(PROMPT, return_tensors="pt")["input_ids"])
    qwen.load_state_dict(weights)
    qwen.save_pretrained(output)
    tokenizer.save_pretrained(output)


def compare(model: Path, output: Path) -> dict[str, Any]:
    """Source and result loaded whole by transformers, one after the other."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    tokens, texts = ids.repeat(1, REPEATED), []

    def logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
        # Grouped products know no float64.
        experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **experts)
        if any(info.values()):
            sys.exit(f"{folder} does not fit its class: {info}")
        with torch.no_grad():
            if dtype == torch.float32:
                texts.append(loaded.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False))
            found: torch.Tensor = loaded.eval()(tokens, use_cache=False).logits
        return found

    before, after = (logits(folder, torch.float32) for folder in (model, output))
    largest = float(before.abs().max())
    found = {"difference": before - after}
    if fits_in_float64(model):
        exact = logits(model, torch.float64)
        found["rounding"] = exact - before
        if fits_in_float64(output):
            found["difference_in_float64"] = exact - logits(output, torch.float64)
    differences = {f"max_{name}": float(difference.abs().max()) for name, difference in found.items()}
    return {
        **differences,
        "max_logit": largest,
        "relative_reordered": [
            float((before - other).abs().max()) / largest for other in logits_in_other_orders(model, tokens)
        ],
        "bit_equal": torch.equal(before, after),
        "same_text": torch.equal(*texts),
        **{name.replace("max", "relative"): difference / largest for name, difference in differences.items()},
    }


def fits_in_float64(folder: Path) -> bool:
    """Whether a model of two bytes a number leaves a third of the free memory when each takes eight."""
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return 4 * written < psutil.virtual_memory().available * 2 / 3


def logits_in_other_orders(folder: Path, tokens: Any) -> Iterator[Any]:
    """Logits in float32 with the neurons of each feed-forward in other orders, which changes what is added up first."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for _ in range(ORDERS):
        for layer in model.model.layers:
            gate, up, down = layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj
            order = torch.randperm(gate.weight.shape[0], generator=generator)
            for projection in (gate, up):
                projection.weight.data = projection.weight.data[order]
            down.weight.data = down.weight.data[:, order].contiguous()
        with torch.no_grad():
            yield model(tokens, use_cache=False).logits


def child_of(model: Path, kind: str, output: Path) -> list[str | Path]:
    """The command of a process of its own for one kind."""
    return [sys.executable, __file__, "--model", model.resolve(), "--kind", kind, "--child", output]


def measure(model: Path, kind: str, scratch: Path, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    target, copied = scratch / "out", scratch / "copy"
    child = child_of(model, kind, target)
    rows, copies = [], []
    for turn in range(repeats + 1):
        shutil.rmtree(target, ignore_errors=True)
        row = json.loads(run_command(child).stdout.splitlines()[-1])
        began = time.perf_counter()
        subprocess.run(["cp", "-r", str(target), str(copied)], check=True)
        seconds = time.perf_counter() - began
        shutil.rmtree(copied)
        # The first turn warms the page cache.
        if turn:
            rows.append(row)
            copies.append(seconds)
    # In a process of its own: children start with the highest memory of their parent, and would seem to need none.
    whole = json.loads(run_command([*child, "--compare"]).stdout.splitlines()[-1])
    written = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    shutil.rmtree(target)
    seconds, copy_seconds = statistics.median(row["seconds"] for row in rows), statistics.median(copies)
    check = rows[0]["check"]
    return {
        "bytes": written,
        "whole": whole,
        "cut": {key: check[key] for key in ("promised", "reasons", "difference", "largest_logit", "layers")},
        "seconds": seconds,
        "cp_seconds": copy_seconds,
        "times_cp": seconds / copy_seconds,
        "writing_above_imports_bytes": max(row["writing_bytes"] - row["baseline_bytes"] for row in rows),
        "check_seconds": statistics.median(row["check_seconds"] for row in rows),
        "check_above_imports_bytes": max(row["check_bytes"] - row["baseline_bytes"] for row in rows),
    }


def run_child(arguments: argparse.Namespace, model: Path) -> None:
    """What a process of its own does for a kind."""
    if arguments.biased:
        write_biased(model, arguments.child)
    elif arguments.compare:
        print(json.dumps(compare(model, arguments.child)))
    else:
        print(json.dumps(rewrite(model, arguments.kind[0], arguments.child)))


def main() -> None:
    """Measure each kind."""
    parser = parser_of(__doc__, model="smollm2-135m-instruct")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--qwen2", type=Path, help="folder of a Qwen2 for the kinds for qwen2_moe; default: drawn biases"
    )
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="measure these alone")
    parser.add_argument("--child", type=Path, help="rewrite to this folder, in this process, and print the figures")
    parser.add_argument("--compare", action="store_true", help="compare the model with this folder instead")
    parser.add_argument("--biased", action="store_true", help="write the model with biases to this folder instead")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    model = find_model(arguments.model)
    if arguments.child is not None:
        run_child(arguments, model)
        return
    rows = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as room:
        scratch = Path(room)
        for kind in arguments.kind:
            source = model
            if QWEN2_MOE["target"] in {step.get("target") for step in KINDS[kind]}:
                source = arguments.qwen2 or scratch / "qwen2"
                if not source.exists():
                    run_command([*child_of(model, kind, source), "--biased"])
            rows[kind] = measure(source, kind, scratch, arguments.repeats)
    write_result(
        "rewrites",
        settings={
            "model": model.name,
            "qwen2": arguments.qwen2 and arguments.qwen2.name,
            "repeats": arguments.repeats,
            "rewrites": {kind: KINDS[kind] for kind in arguments.kind},
        },
        results=rows,
        label=arguments.label,
    )


if __name__ == "__main__":
    main()
