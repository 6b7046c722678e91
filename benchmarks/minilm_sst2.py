"""all-MiniLM-L6-v2 fine-tuned on SST-2, then made linear in all layers: how many of its right answers it keeps.

    python benchmarks/minilm_sst2.py --model models/all-minilm-l6-v2

One epoch on 6,920 sentences; recipe `hedgehog-encoder` on the same sentences without their labels; accuracy on 872
others, in padded batches of mixed lengths.
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
SETTINGS = {"stages.0.tokens": 300_000, "stages.0.sequence_length": 64, "stages.0.batch_size": 8}


def main() -> None:
    """Fine-tune, convert, and compare on the sentences held back."""
    parser = parser_of(__doc__, model="all-minilm-l6-v2")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    model = find_model(arguments.model, "all-minilm-l6-v2")
    tokenizer = AutoTokenizer.from_pretrained(model)
    dev = read(find_data(DEV))
    changes = [f"{key}={value}" for key, value in SETTINGS.items()]
    recipe = load_recipe(
        "hedgehog-encoder", [*changes, f"data={json.dumps({'path': str(find_data(TRAIN))})}", *arguments.changes]
    )
    with tempfile.TemporaryDirectory() as scratch:
        tuned, output = Path(scratch) / "tuned", Path(scratch) / "linear"
        began = time.monotonic()
        fine_tune(model, read(find_data(TRAIN)), tokenizer, tuned)
        seconds = time.monotonic() - began
        result = run_conversion(tuned, recipe, output)
        right = {folder.name: answers(folder, tokenizer, dev) for folder in (tuned, output)}
    accuracy = {name: float(found.float().mean()) for name, found in right.items()}
    write_result(
        "minilm_sst2",
        settings={
            "model": model.name,
            "train": TRAIN,
            "dev": DEV,
            "recipe": recipe.compact()["stages"][0],
            "batch": BATCH,
        },
        results={
            "sentences": len(dev),
            "accuracy": accuracy,
            "accuracy_kept": accuracy["linear"] / accuracy["tuned"],
            "same_answers": float((right["tuned"] == right["linear"]).float().mean()),
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
    batches = torch.randperm(len(rows)).split(BATCH)
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
    return torch.cat(right)


if __name__ == "__main__":
    main()
