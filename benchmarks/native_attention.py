"""Attention reshaped into native classes, before any healing: perplexity of each form of SmolLM2 beside its own.

    python benchmarks/native_attention.py --model models/smollm2-135m-instruct

Each form is converted from the same float32 weights, measured on the first 4,096 tokens of Wikipedia paragraphs where
it asks for that, and loaded by transformers alone. Perplexity is that of the first 5,120 tokens of WikiText-2 valid in
windows of 1,024. Logits are compared on cut models, or on the first 512 tokens of that text where a rewrite needs no
calibration. `pool_pca` and `latent` have bounds; the command ends with an error if one is missed.

Those that change nothing are compared with the model on the first 64, 512 and 1,024 tokens too, in float32. What
rounding comes to there is told by the model itself: with its attention computed by the other of transformers' two ways.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import find_data, find_model, parser_of, set_threads, write_result

TOKENS, CONTEXT, CALIBRATION = 5120, 1024, 4096
CASES: dict[str, dict[str, Any]] = {
    "degroup": {"kind": "degroup"},
    "prune_kv_heads": {"kind": "prune_heads", "keep": 2},
    "pool_pca": {"kind": "pool_heads", "kv_heads": 1},
    "pool_mean": {"kind": "pool_heads", "kv_heads": 1, "how": "mean"},
    "pool_select": {"kind": "pool_heads", "kv_heads": 1, "how": "select"},
    "latent_whole": {"kind": "latent"},
    "latent_256": {"kind": "latent", "numbers": 256},
    "latent_192": {"kind": "latent", "numbers": 192},
    "latent_192_without_constant": {"kind": "latent", "numbers": 192, "constant": False},
    "window_1024": {"kind": "window", "window": 1024, "keep": {"every": 4, "offset": 3}},
}
UNCHANGED = ("degroup", "latent_whole")
PREFIXES = (64, 512, 1024)
WITHOUT_TEXT = ("degroup", "pool_mean", "latent_whole", "window_1024")
BOUNDS = {"pool_pca": 190.0, "latent_256": 18.5, "latent_192": 27.0}
"""Perplexities that are not to be exceeded."""


def measured(folder: Path, tokens: Any, tokenizer: Any) -> float:
    """Perplexity of a model that transformers loads."""
    import torch
    from transformers import AutoModelForCausalLM

    from attnconv.evaluate import perplexity

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return perplexity(model, tokens, context=CONTEXT, limit=TOKENS, tokenizer=tokenizer).perplexity


def converted(model: Path, step: dict[str, Any], output: Path, text: Path | None) -> dict[str, Any]:
    """Convert, and tell how long it took and how far the start is from the model's, on a text or on a cut of it."""
    from attnconv.recipes import Recipe
    from attnconv.runs import run_conversion

    began = time.perf_counter()
    recipe = Recipe(name="native", rewrite=[{"kind": "cast", "dtype": "float32"}, step])
    result = run_conversion(model, recipe, output, compare_on=text)
    exactness = result.exactness.to_dict() if result.exactness is not None else {}
    figures = {key: exactness.get(key) for key in ("difference", "largest_logit", "text_tokens")}
    return {"seconds": round(time.perf_counter() - began, 1), **figures}


def logits_of(folder: Path, tokens: Any, attention: str = "sdpa") -> list[Any]:
    """Logits of each of the prefixes."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    with torch.no_grad():
        return [model(tokens[None, :length], use_cache=False).logits for length in PREFIXES]


def distances(wanted: list[Any], found: list[Any]) -> dict[int, list[float]]:
    """For each prefix the largest difference and the largest logit."""
    return {
        length: [float((one - other).abs().max()), float(one.abs().max())]
        for length, one, other in zip(PREFIXES, wanted, found, strict=True)
    }


def main() -> None:
    """Convert and measure one case after another."""
    parser = parser_of(__doc__, model="smollm2-135m-instruct")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="cases to run")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    model = find_model(arguments.model)
    text, training = find_data("eval/wikitext2_valid_detok.txt.gz"), find_data("train/wikipedia_paragraphs.jsonl.gz")
    from transformers import AutoTokenizer

    from attnconv.evaluate import load_tokens

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = load_tokens(text, tokenizer, context=CONTEXT, limit=TOKENS)
    results: dict[str, Any] = {"model": {"perplexity": measured(model, tokens, tokenizer)}}
    wanted = logits_of(model, tokens.flatten())
    results["model"]["computed_otherwise"] = distances(wanted, logits_of(model, tokens.flatten(), "eager"))
    calibrate = {"path": str(training), "tokens": CALIBRATION, "sequence_length": CONTEXT}
    for name in arguments.only:
        step = dict(CASES[name]) if name in WITHOUT_TEXT else {**CASES[name], "calibrate": calibrate}
        with tempfile.TemporaryDirectory() as room:
            output = Path(room) / "out"
            results[name] = converted(model, step, output, text if name in WITHOUT_TEXT else None)
            results[name]["perplexity"] = measured(output, tokens, tokenizer)
            if name in UNCHANGED:
                results[name]["difference_of_largest"] = distances(wanted, logits_of(output, tokens.flatten()))
        print(name, results[name], file=sys.stderr, flush=True)
    write_result(
        "native_attention",
        settings={
            "model": model.name,
            "tokens": TOKENS,
            "context": CONTEXT,
            "calibration_tokens": CALIBRATION,
            "cases": {name: CASES[name] for name in arguments.only},
            "bounds": BOUNDS,
        },
        results=results,
        label=arguments.label,
    )
    beyond = {name: results[name]["perplexity"] for name, bound in BOUNDS.items() if name in results}
    missed = [f"{name} {found:.4g} > {BOUNDS[name]}" for name, found in beyond.items() if found > BOUNDS[name]]
    if missed:
        sys.exit(f"Perplexity beyond its bound: {', '.join(missed)}")


if __name__ == "__main__":
    main()
