"""all-MiniLM-L6-v2 fine-tuned on SST-2, then converted in all layers: how many of its right answers it keeps.

    python benchmarks/minilm_sst2.py --model models/all-minilm-l6-v2
    python benchmarks/minilm_sst2.py --model models/all-minilm-l6-v2 --recipe shrp

One epoch on 6,920 sentences; recipe `hedgehog-encoder` (linear attention) or `shrp` (half of the heads left out) on the
same sentences without their labels; accuracy on 872 others, in padded batches of mixed lengths. `--tune-again` tunes
what is left once more, as the whole model was.
"""

import gzip
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import find_data, find_model, parser_of, peak_bytes, set_threads, write_result
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from attnconv import load_recipe, run_conversion

TRAIN, DEV = "classification/sst2_train.jsonl.gz", "classification/sst2_dev.jsonl.gz"
BATCH, LEARNING_RATE, SEED = 32, 1e-4, 0
SETTINGS: dict[str, dict[str, int]] = {
    "hedgehog-encoder": {"stages.0.tokens": 300_000, "stages.0.sequence_length": 64, "stages.0.batch_size": 8},
    "shrp": {"stages.0.sequence_length": 64, "stages.1.tokens": 40_960, "stages.1.sequence_length": 64},
}
# Batches out of which sentences of about the same length are put together.
POOL = 16


def main() -> None:
    """Fine-tune, convert, and compare on the sentences held back."""
    parser = parser_of(__doc__, model="all-minilm-l6-v2")
    parser.add_argument("--recipe", choices=SETTINGS, default="hedgehog-encoder")
    parser.add_argument("--tune-again", action="store_true", help="tune the converted model on the labels too")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    model = find_model(arguments.model, "all-minilm-l6-v2")
    tokenizer = AutoTokenizer.from_pretrained(model)
    dev = read(find_data(DEV))
    changes = [f"{key}={value}" for key, value in SETTINGS[arguments.recipe].items()]
    recipe = load_recipe(
        arguments.recipe, [*changes, f"data={json.dumps({'path': str(find_data(TRAIN))})}", *arguments.changes]
    )
    with tempfile.TemporaryDirectory() as scratch:
        tuned, converted, again = (Path(scratch) / name for name in ("tuned", "converted", "tuned_again"))
        began = time.monotonic()
        fine_tune(model, read(find_data(TRAIN)), tokenizer, tuned)
        seconds = time.monotonic() - began
        right = {tuned.name: answers(tuned, tokenizer, dev)}
        result = run_conversion(tuned, recipe, converted)
        right[converted.name] = answers(converted, tokenizer, dev)
        if arguments.tune_again:
            fine_tune(converted, read(find_data(TRAIN)), tokenizer, again)
            right[again.name] = answers(again, tokenizer, dev)
        folders = [folder for folder in (tuned, converted, again) if folder.name in right]
        parameters = {folder.name: attention_parameters(folder) for folder in folders}
    accuracy = {name: float(found.float().mean()) for name, found in right.items()}
    last = folders[-1].name
    write_result(
        "minilm_sst2",
        settings={
            "model": model.name,
            "train": TRAIN,
            "dev": DEV,
            "recipe": arguments.recipe,
            "rules": [rule.compact() for rule in recipe.attention],
            "stages": recipe.compact()["stages"],
            "batch": BATCH,
        },
        results={
            "sentences": len(dev),
            "accuracy": accuracy,
            "accuracy_kept": accuracy[last] / accuracy["tuned"],
            "same_answers": float((right["tuned"] == right[last]).float().mean()),
            "attention_parameters": parameters,
            "attention_parameters_left_out": 1 - parameters[last] / parameters["tuned"],
            "converted": len(result.plan.converted),
            "start_distance": dict(result.start_distance),
            "stages": [dict(row) for row in result.metrics],
            "tuning_seconds": seconds,
            "conversion_seconds": result.seconds,
            "peak_bytes": peak_bytes(),
        },
        label=arguments.label,
    )


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a compressed file of JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def fine_tune(source: Path, rows: list[dict[str, Any]], tokenizer: Any, folder: Path) -> None:
    """One epoch of a classifier, the learning rate falling to zero."""
    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2, dtype=torch.float32)
    batches = [
        batch
        for pool in torch.randperm(len(rows)).split(POOL * BATCH)
        for batch in torch.tensor(sorted(pool.tolist(), key=lambda index: len(rows[index]["text"]))).split(BATCH)
    ]
    batches = [batches[place] for place in torch.randperm(len(batches)).tolist()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    model.train()
    for batch in batches:
        chosen = [rows[index] for index in batch.tolist()]
        inputs = tokenizer([row["text"] for row in chosen], padding=True, truncation=True, return_tensors="pt")
        model(**inputs, labels=torch.tensor([row["label"] for row in chosen])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def answers(folder: Path, tokenizer: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """`[rows]` bool: which a classifier gets right."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    right = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        inputs = tokenizer([row["text"] for row in batch], padding=True, truncation=True, return_tensors="pt")
        right.append(model(**inputs).logits.argmax(-1) == torch.tensor([row["label"] for row in batch]))
    found = torch.cat(right)
    print(folder.name, float(found.float().mean()), flush=True)
    return found


def attention_parameters(folder: Path) -> int:
    """Numbers in the attention of all layers: projections, biases and what a method adds, without the norms."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    names = {name: parameter for name, parameter in model.named_parameters() if ".attention." in name}
    return sum(parameter.numel() for name, parameter in names.items() if "LayerNorm" not in name)


if __name__ == "__main__":
    main()
