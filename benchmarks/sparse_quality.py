"""What training-free sparse attention costs on real text: perplexity against the density that was counted, as a curve.

SmolLM2-135M, WikiText-2 (valid) in one context; every layer sparse, prompts sparse.

python benchmarks/sparse_quality.py --model DIR
"""

import gzip
import math
import time
from pathlib import Path
from typing import Any

from common import RESULTS, Rows, add_rows_option, find_data, find_model, parser_of, set_threads, write_result

Case = tuple[str, dict[str, Any]]
PUBLISHED = {"query": "block", "decode": "dense"}
# What says most comes first: a run takes about a minute for each in one thread.
CASES: dict[str, list[Case]] = {
    "xattention, as published, by mass": [
        ("xattention", {**PUBLISHED, "stride": 8, "mass": mass}) for mass in (0.9, 0.8)
    ],
    "xattention, by the block before, by mass": [("xattention", {"mass": mass}) for mass in (0.9, 0.8)],
    "quest, each token, top-k": [("quest", {"density": share, "budget": None}) for share in (0.5, 0.25, 0.1)],
    "xattention, by the block before, top-k": [("xattention", {"density": share}) for share in (0.5, 0.25)],
    "block means, as published, top-k": [("sparse", {**PUBLISHED, "density": share}) for share in (0.5, 0.25)],
    "sinks and window": [("spans", {"base": 0.0, "growth": share}) for share in (0.3, 0.14)],
    "vertical and slash lines, by the block before 1,024": [("vertical_slash", {"columns": 16, "diagonals": 8})],
    "flexprefill, by mass": [("flexprefill", {"mass": 0.9})],
    "hip, by the block before": [("hip", {"blocks": number}) for number in (32, 16)],
    "recycled, every 50 tokens": [("recycled", {"budget": 512})],
    "lserve, every 4 tokens": [("lserve", {"budget": 512})],
    "moba, blocks of 64": [("moba", {"block": 64, "top_k": 8})],
    "strided": [("strided", {"stride": 4})],
    "powers of two": [("power", {})],
    "bigbird": [("bigbird", {"random_blocks": 6})],
}


def main() -> None:
    """Measure, write and draw."""
    parser = parser_of(__doc__, model="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME")
    add_rows_option(parser)
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import attnconv
    from attnconv.attention_modules.counting import counting
    from attnconv.formats import ratio

    folder, data = find_model(arguments.model), find_data("eval/wikitext2_valid_detok.txt.gz")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = gzip.decompress(data.read_bytes()).decode()
    tokens = AutoTokenizer.from_pretrained(folder)(text[: 8 * arguments.tokens], return_tensors="pt")["input_ids"]
    tokens = tokens[:, : arguments.tokens]

    def measured(method: str, options: dict[str, Any]) -> dict[str, Any]:
        began = time.process_time()
        with attnconv.sparse(model, method, **options), counting(model) as counter:
            found = perplexity(model, tokens)
        return {
            "perplexity": found,
            "density": counter.total.density,
            "cpu_seconds": time.process_time() - began,
        }

    settings = {"model": folder.name, "tokens": arguments.tokens, "dtype": "float32", "layers": "all"}
    kept = Rows(arguments.rows)
    dense = kept.row({**settings, "method": None}, lambda: {"perplexity": perplexity(model, tokens)})["perplexity"]
    print(f"dense {dense:.3f}")
    rows = []
    for name in arguments.cases:
        for method, options in CASES[name]:
            row = {"case": name, "method": method, "options": options}
            row |= kept.row({**settings, **row}, lambda method=method, options=options: measured(method, options))
            row["of_dense"] = row["perplexity"] / dense
            rows.append(row)
            print(f"{name}: {options}: {row['perplexity']:.3f} ({ratio(row['of_dense'])}) at {row['density']:.3f}")
    results = {"dense": dense, "rows": rows}
    path = write_result("sparse_quality", settings=settings, results=results, label=arguments.label)
    draw(rows, dense, RESULTS / f"{path.stem}.png")


def perplexity(model: Any, tokens: Any) -> float:
    """Of all tokens but the first, each after all before it."""
    import torch
    import torch.nn.functional as F

    total, length = 0.0, tokens.shape[1]
    with torch.inference_mode():
        hidden = model.model(tokens, use_cache=False).last_hidden_state[0]
        for start in range(0, length - 1, 512):
            stop = min(start + 512, length - 1)
            logits = model.lm_head(hidden[start:stop]).float()
            total += F.cross_entropy(logits, tokens[0, start + 1 : stop + 1], reduction="sum").item()
    return math.exp(total / (length - 1))


def draw(rows: list[dict[str, Any]], dense: float, path: Path) -> None:
    """Perplexity over dense perplexity against density, a curve for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for name in dict.fromkeys(row["case"] for row in rows):
        points = sorted((row["density"], row["of_dense"]) for row in rows if row["case"] == name)
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(xlabel="query-key pairs attended (share of the causal ones)", ylabel=f"perplexity (dense {dense:.2f} = 1)")
    axes.set_yscale("log")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    print(f"drawn to {path}")


if __name__ == "__main__":
    main()
