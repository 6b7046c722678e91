"""SmolLM2-135M made a hybrid with a few minutes of healing: what it still finds in long prompts, and its perplexity.

    python benchmarks/smollm2_passkeys.py --set "attention.0.layers='4,7,17,18,21-23'"

61,440 tokens of attention transfer on Wikipedia paragraphs by the recipe `hybrid`, bf16. A prompt hides a number in a
text of 2,000 or 8,000 characters, at one of three depths. The first four prompts of each depth and the four after them
are counted apart, so that layers chosen by the first ones can be judged by the others. Answers are greedy, in bf16.
"""

import argparse
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import find_data, find_model, parser_of, set_threads, write_result
from smollm2_lolcats import TRAIN, convert
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnconv.evaluate.tasks.retrieval import continuations

PROMPTS, LENGTHS, DEPTHS, PER_DEPTH = "longdoc/passkey.jsonl.gz", (2_000, 8_000), (0.1, 0.5, 0.9), 4
SETTINGS = {"stages.0.tokens": 61_440, "stages.0.sequence_length": 1_024}
NEW_TOKENS, AT_ONCE = 10, 8_000


def main() -> None:
    """Convert, then ask teacher and conversion."""
    parser = parser_of(__doc__, model="smollm2-135m-instruct")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--recipe", default="hybrid")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, help="keep the converted model in this folder")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    model = find_model(arguments.model)
    with gzip.open(find_data(PROMPTS), "rt", encoding="utf-8") as lines:
        prompts = chosen([json.loads(line) for line in lines])
    with tempfile.TemporaryDirectory() as scratch:
        output = arguments.output or Path(scratch) / "out"
        conversion, receipt = convert(model, arguments.recipe, output, SETTINGS, arguments.changes)
        found = {role: answers(folder, prompts) for role, folder in (("teacher", model), ("converted", output))}
    write_result(
        "smollm2_passkeys",
        settings={
            "model": model.name,
            "recipe": arguments.recipe,
            "train": TRAIN,
            "prompts": PROMPTS,
            "changes": {**SETTINGS, **dict(change.split("=", 1) for change in arguments.changes)},
        },
        results={
            "found": found,
            "stages": receipt.get("metrics"),
            "conversion_seconds": conversion.seconds,
            "peak_bytes": conversion.peak_bytes,
        },
        label=arguments.label,
    )


def chosen(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Prompts by length and half: the first four of each depth, and the four after them."""
    groups = {}
    for chars in LENGTHS:
        cells = [[row for row in rows if (row["chars"], row["depth"]) == (chars, depth)] for depth in DEPTHS]
        for half, start in (("first", 0), ("other", PER_DEPTH)):
            groups[f"{chars} characters, {half}"] = [row for cell in cells for row in cell[start : start + PER_DEPTH]]
    return groups


def answers(folder: Path, prompts: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """By group: how many numbers a model finds, of how many, and the prompts' mean length in tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    found = {}
    for group, rows in prompts.items():
        ids = [tokenizer(row["prompt"])["input_ids"] for row in rows]
        size = max(1, AT_ONCE // max(map(len, ids)))
        texts = [
            text
            for at in range(0, len(ids), size)
            for text in continuations(model, tokenizer, ids[at : at + size], NEW_TOKENS)
        ]
        right = [str(row["answer"]) in text for row, text in zip(rows, texts, strict=True)]
        found[group] = {"found": sum(right), "of": len(right), "tokens": sum(map(len, ids)) / len(ids), "which": right}
    return found


if __name__ == "__main__":
    main()
