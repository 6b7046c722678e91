"""Our multiple-choice scores beside lm-eval's: how many answers are right by each, over the very same rows.

python benchmarks/multiple_choice_check.py --model models/smollm2-135m-instruct --limit 100
"""

import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import yaml
from common import find_data, find_model, parser_of, set_threads, write_result

# What lm-eval 0.4.13 has in its tasks of these names, over the fields of our rows.
PROMPTS = {
    "piqa": {"doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "{{choices}}"},
    "openbookqa": {"doc_to_text": "question", "doc_to_choice": "{{choices}}"},
    "commonsenseqa": {
        "doc_to_text": "Question: {{ question.strip() }}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
        "D. {{choices[3]}}\nE. {{choices[4]}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D", "E"],
    },
    "boolq": {"doc_to_text": "{{passage}}\nQuestion: {{question}}?\nAnswer:", "doc_to_choice": ["no", "yes"]},
}
METRICS = {"acc": "correct", "acc_norm": "correct_normalised"}


def write_task(folder: Path, name: str, rows: list[dict]) -> None:
    """Write the rows and lm-eval's task over them."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps({**row, "label": int(row["label"])}) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": f"check_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_target": "label",
        **PROMPTS[name],
        "metric_list": [{"metric": key, "aggregation": "mean", "higher_is_better": True} for key in METRICS],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def theirs(evaluated, folder: Path, name: str, batch_size: int) -> dict[int, dict[str, object]]:
    """lm-eval's scores, and the answers it chose, by row."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    answers = lm_eval.simple_evaluate(
        model=HFLM(pretrained=evaluated.model, tokenizer=evaluated.tokenizer, backend="causal", batch_size=batch_size),
        tasks=[f"check_{name}"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    scores = {}
    for sample in answers["samples"][f"check_{name}"]:
        found = [float(answer[0]) for answer in sample["filtered_resps"]]
        scores[sample["doc_id"]] = {
            **{key: float(sample[key]) for key in METRICS},
            "chosen": found.index(max(found)),
        }
    return scores


def ours(evaluated, name: str, path: str, limit: int | None, batch_size: int) -> dict[int, dict[str, object]]:
    """Our scores, and the answers we chose, by row."""
    from attnconv.evaluate.tasks.base import Scope
    from attnconv.evaluate.tasks.multiple_choice import LETTERS, MultipleChoiceSettings, MultipleChoiceTask

    task = MultipleChoiceTask(MultipleChoiceSettings(data=path))
    names = ["no", "yes"] if name == "boolq" else list(LETTERS)
    scores = {}
    for unit in task.units(evaluated, Scope(limit, batch_size)):
        for item in task.measure(evaluated, unit).items:
            scores[int(item.id)] = {
                **{key: item.values[value] for key, value in METRICS.items()},
                "chosen": names.index(item.note.split(",")[0]),
            }
    return scores


def compare(evaluated, name: str, path: str, limit: int | None, batch_size: int) -> dict[str, object]:
    """Right answers by both, and the rows on which they differ."""
    from attnconv.evaluate.tasks.packaged import data_file
    from attnconv.evaluate.tasks.rows import read_rows

    rows = list(read_rows(data_file(path), limit=limit))
    began = time.perf_counter()
    own = ours(evaluated, name, path, limit, batch_size)
    between = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder), name, rows)
        other = theirs(evaluated, Path(folder), name, batch_size)
    ended = time.perf_counter()
    assert own.keys() == other.keys() == set(range(len(rows)))
    return {
        "questions": len(rows),
        "correct": {
            key: {
                "attnconv": int(sum(row[key] for row in own.values())),
                "lm_eval": int(sum(row[key] for row in other.values())),
            }
            for key in METRICS
        },
        "differing": {key: sum(own[row][key] != other[row][key] for row in own) for key in [*METRICS, "chosen"]},
        "seconds": {"attnconv": between - began, "lm_eval": ended - between},
    }


def main() -> None:
    """Compare on all tasks asked for."""
    parser = parser_of(__doc__, model="smollm2-135m-instruct")
    parser.add_argument("--tasks", nargs="+", default=list(PROMPTS), choices=list(PROMPTS))
    parser.add_argument("--limit", type=int, default=None, help="questions of each task at most; default: all")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    folder = find_model(arguments.model)
    import lm_eval

    from attnconv.evaluate.engine.models import load_evaluated, open_evaluated

    evaluated = open_evaluated("model", str(folder))
    load_evaluated(evaluated, dtype=arguments.dtype)
    results = {}
    for name in arguments.tasks:
        path = str(find_data("eval/boolq_dev.jsonl.gz")) if name == "boolq" else name
        results[name] = compare(evaluated, name, path, arguments.limit, arguments.batch_size)
        print(name, json.dumps(results[name]), file=sys.stderr)
    settings = {
        "model": folder.name,
        "dtype": arguments.dtype,
        "device": str(evaluated.device),
        "limit": arguments.limit,
        "batch_size": arguments.batch_size,
        "lm_eval": lm_eval.__version__,
    }
    write_result("multiple_choice_check", settings=settings, results=results, label=arguments.label)


if __name__ == "__main__":
    main()
