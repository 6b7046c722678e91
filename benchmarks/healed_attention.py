"""Attention reshaped into native classes, then healed by the model that it was made from: perplexity of SmolLM2.

    python benchmarks/healed_attention.py --model models/smollm2-135m-instruct

Each case is one conversion in float32: a rewrite settled on the first 4,096 tokens of Wikipedia paragraphs, then stages
of logit distillation on these with low-rank updates, which end up in the weights. Perplexity is that of the first 5,120
tokens of WikiText-2 valid in windows of 1,024: of the model itself, after the rewrite, and after each stage. A run that
was interrupted goes on where it was if `--folder` is the same. The command ends with an error if a bound is missed.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from common import find_data, find_model, parser_of, set_threads, write_result

TOKENS, CONTEXT, CALIBRATION = 5120, 1024, 4096
STAGE_TOKENS = 20_480
LEARNING = {
    "kind": "logits",
    "tokens": STAGE_TOKENS,
    "sequence_length": 256,
    "schedule": "cosine",
    "warmup_steps": 2,
    "train_cores": False,
    "save_every": 20,
}
CASES: dict[str, dict[str, Any]] = {
    "pool_pca": {
        "rewrite": {"kind": "pool_heads", "kv_heads": 1},
        "targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "learning_rate": 1e-3,
        "stages": 1,
    },
    "latent_192": {
        "rewrite": {"kind": "latent", "numbers": 192},
        "targets": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        "learning_rate": 5e-4,
        "stages": 2,
    },
    # The same tokens in one stage, and the feed-forwards learn too.
    "latent_192_once": {
        "rewrite": {"kind": "latent", "numbers": 192},
        "targets": [
            *("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
            *("gate_proj", "up_proj", "down_proj"),
        ],
        "learning_rate": 8e-4,
        "stages": 1,
        "tokens": 2 * STAGE_TOKENS,
    },
}
RANK = 64
BOUNDS = {"pool_pca": [60.0], "latent_192": [17.9]}
"""Perplexities that are not to be exceeded, after the first stages of a case."""


def healed(model: Path, case: dict[str, Any], text: Path, training: Path, output: Path) -> dict[str, Any]:
    """Convert and heal; what was measured at each moment, and how long it took."""
    from attnconv.recipes import Recipe
    from attnconv.runs import run_conversion

    calibrate = {"path": str(training), "tokens": CALIBRATION, "sequence_length": CONTEXT}
    lora = {"rank": RANK, "alpha": RANK, "targets": case["targets"]}
    tokens = case.get("tokens", STAGE_TOKENS)
    stage = {**LEARNING, "tokens": tokens, "learning_rate": case["learning_rate"], "lora": lora}
    recipe = Recipe(
        name="healed",
        rewrite=[{"kind": "cast", "dtype": "float32"}, {**case["rewrite"], "calibrate": calibrate}],
        data={"path": str(training)},
        stages=[stage] * case["stages"],
        evaluate={"path": str(text), "tokens": TOKENS, "context": CONTEXT},
    )
    result = run_conversion(model, recipe, output, resume=True, device="cpu")
    return {"moments": list(result.metrics), "seconds": round(result.seconds, 1)}


def main() -> None:
    """Heal and measure one case after another."""
    parser = parser_of(__doc__, model="smollm2-135m-instruct")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="cases to run")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    model = find_model(arguments.model)
    text, training = find_data("eval/wikitext2_valid_detok.txt.gz"), find_data("train/wikipedia_paragraphs.jsonl.gz")
    results: dict[str, Any] = {}
    for name in arguments.only:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as room:
            folder = Path(room) if arguments.folder is None else arguments.folder
            results[name] = healed(model, CASES[name], text, training, folder / name)
        print(name, results[name], file=sys.stderr, flush=True)
    write_result(
        "healed_attention",
        settings={
            "model": model.name,
            "tokens": TOKENS,
            "context": CONTEXT,
            "calibration_tokens": CALIBRATION,
            "rank": RANK,
            "stage": LEARNING,
            "cases": {name: CASES[name] for name in arguments.only},
            "bounds": BOUNDS,
        },
        results=results,
        label=arguments.label,
    )
    missed = []
    for name, found in results.items():
        after = [row["perplexity"] for row in found["moments"] if row["stage"].startswith("logits")]
        for bound, perplexity in zip(BOUNDS.get(name, ()), after, strict=False):
            if perplexity > bound:
                missed.append(f"{name} {perplexity:.4g} > {bound}")
    if missed:
        sys.exit(f"Perplexity beyond its bound: {', '.join(missed)}")


if __name__ == "__main__":
    main()
