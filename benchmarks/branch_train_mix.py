"""A branch-train-mix in small: SmolLM2 tuned on code, maths and books apart, then mixed and tuned together.

    python benchmarks/branch_train_mix.py --model models/smollm2-135m-instruct --folder /tmp/mix

Three branches are tuned by low-rank updates on all projections and merged. `btx` makes experts of their feed-forwards
and of the model's own and averages the rest, with random routers or with those of `centroids`; `bam` makes experts of
their attentions too. All are then tuned together for the joint budget on all three subjects, and so is `dense`, the
model itself, for the tokens of the branches besides.

Perplexity is measured on text that nobody trained on, the same number of tokens of each subject. The mean over the
three is reported for all models, and the curve of perplexity on the three texts together over the budget, which is
drawn too. Models that are in `--folder` are not made again, and a run that was interrupted goes on where it was.
"""

import argparse
import gzip
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import find_data, find_model, parser_of, set_threads, write_result

SUBJECTS = {
    "code": ("train/gpteacher_codegen.jsonl.gz", ("instruction", "input", "output")),
    "maths": ("train/gsm8k_train.jsonl.gz", ("question", "answer")),
    "books": ("train/books_train.jsonl.gz", ("text",)),
}
CHARACTERS = 1200
"""Of one piece of text, so that all subjects have as much of it; shorter documents are joined."""
HELD_OUT = 60
MIXTURES = ("btx", "bam", "btx-centroids")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = PROJECTIONS[:4]
CONTEXT = 512
PARTS = 3
"""Of the joint training, with a point of the curve behind each."""
TO_FLOAT32 = {"kind": "cast", "dtype": "float32"}


def pieces(subject: str, count: int) -> list[str]:
    """Text of one subject in pieces of one length, from the beginning of its file."""
    path, fields = SUBJECTS[subject]
    found: list[str] = []
    held = ""
    for document in _documents(find_data(path), fields):
        held += ("\n\n" if held else "") + document
        while len(held) >= CHARACTERS:
            found.append(held[:CHARACTERS])
            held = held[CHARACTERS:]
            if len(found) == count:
                return found
    sys.exit(f"{path} holds {len(found)} pieces of text, and {count} are needed: give smaller budgets")


def _documents(path: Path, fields: tuple[str, ...]) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield "\n".join(str(row[field]) for field in fields if row.get(field))


def write_texts(folder: Path, tokens: int) -> None:
    """A file of text to train on for each subject and for all, one to measure on for each and for all."""
    # A token of these is seldom less than three characters.
    count = tokens * 4 // CHARACTERS + HELD_OUT + 1
    everything: dict[str, list[str]] = {"train": [], "held-out": []}
    for subject in SUBJECTS:
        found = pieces(subject, count)
        # Of books neighbouring pieces are alike, so what is held out comes from everywhere.
        random.Random(0).shuffle(found)
        for part, texts in {"held-out": found[:HELD_OUT], "train": found[HELD_OUT:]}.items():
            _write(folder / f"{part}-{subject}.jsonl", texts)
            everything[part] += texts
    random.Random(1).shuffle(everything["train"])
    _write(folder / "train-all.jsonl", everything["train"])
    # In turns, so that any beginning holds as much of each subject.
    held_out = [everything["held-out"][place::HELD_OUT] for place in range(HELD_OUT)]
    _write(folder / "held-out-all.jsonl", [text for texts in held_out for text in texts])


def _write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def stage(tokens: int, **settings: Any) -> dict[str, Any]:
    """A stage of next-token training by low-rank updates."""
    return {
        "kind": "lora",
        "tokens": tokens,
        "sequence_length": CONTEXT,
        "learning_rate": 5e-4,
        "schedule": "linear",
        "warmup_steps": 2,
        "rank": 16,
        "alpha": 32,
        "targets": PROJECTIONS,
        "save_every": 10,
        **settings,
    }


def recipes(folder: Path, branch: int, joint: int, held_out: int) -> dict[str, dict[str, Any]]:
    """What is made in which order; each can use those before it."""
    made = {
        subject: {
            "rewrite": [TO_FLOAT32],
            "data": {"path": str(folder / f"train-{subject}.jsonl")},
            "stages": [stage(branch)],
        }
        for subject in SUBJECTS
    }
    together = {
        "data": {"path": str(folder / "train-all.jsonl")},
        "evaluate": {
            "path": str(folder / "held-out-all.jsonl"),
            "tokens": len(SUBJECTS) * held_out,
            "context": CONTEXT,
        },
    }
    made["dense"] = {
        **together,
        "rewrite": [TO_FLOAT32],
        "stages": [stage(len(SUBJECTS) * branch), *joint_stages(joint)],
    }
    routed = {
        "targets": [*ATTENTION, "experts"],
        "train_routers": True,
        "core_learning_rate": 1e-3,
        "balance": 0.01,
        "z": 0.001,
    }
    sources = [str(folder / subject) for subject in SUBJECTS]
    experts = {"kind": "experts", "target": "mixtral", "sources": sources, "active": 2}
    made["btx"] = {**together, "rewrite": [experts], "stages": joint_stages(joint, **routed)}
    gates = {"layers": "all", "method": "moa", "options": {"num_experts": len(SUBJECTS) + 1}}
    made["bam"] = {
        **together,
        "rewrite": [experts, {"kind": "widen", "sources": sources}],
        "attention": [gates],
        "stages": joint_stages(joint, **routed, train_cores=True),
    }
    # As `btx`, but its routers know from the start what the subjects look like.
    texts = [str(folder / f"train-{subject}.jsonl") for subject in ("all", *SUBJECTS)]
    informed = {**experts, "router": "centroids", "domains": texts}
    made["btx-centroids"] = {**made["btx"], "rewrite": [informed]}
    return made


def joint_stages(tokens: int, **settings: Any) -> list[dict[str, Any]]:
    """The joint training in parts, whose learning rate falls in the last of them alone."""
    sizes = [tokens // PARTS] * (PARTS - 1) + [tokens - tokens // PARTS * (PARTS - 1)]
    schedules = ["constant"] * (PARTS - 1) + ["linear"]
    pairs = zip(sizes, schedules, strict=True)
    return [stage(size, **{"schedule": schedule, **settings}) for size, schedule in pairs]


def make(base: Path, name: str, given: dict[str, Any], folder: Path) -> None:
    """Make one model, unless it is there already."""
    from attnconv.recipes import Recipe
    from attnconv.runs import run_conversion

    if not (folder / name / "receipt.json").is_file():
        run_conversion(base, Recipe(name=name, **given), folder / name, resume=True, device="cpu")


def curve(folder: Path) -> list[dict[str, Any]]:
    """Perplexity on the three texts together, before and after each stage, with the tokens of the stage."""
    rows = json.loads((folder / "receipt.json").read_text())["metrics"]
    return [{key: row[key] for key in ("stage", "tokens", "perplexity") if key in row} for row in rows]


def perplexities(model: Path, folder: Path, tokens: int) -> dict[str, Any]:
    """Of a model on what is held out of each subject, and their mean."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import attnconv  # noqa: F401
    from attnconv.evaluate import load_tokens, perplexity

    kept = folder / f"{model.name}.perplexity.json"
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = {}
    for subject in SUBJECTS:
        held_out = load_tokens(folder / f"held-out-{subject}.jsonl", tokenizer, context=CONTEXT, limit=tokens)
        measured = perplexity(loaded, held_out, context=CONTEXT, limit=tokens, tokenizer=tokenizer)
        found[subject] = measured.perplexity
    found["mean"] = sum(found.values()) / len(found)
    kept.write_text(json.dumps(found))
    return found


def main() -> None:
    """Read the arguments, and see to a folder."""
    parser = parser_of(__doc__, model="smollm2-135m-instruct")
    parser.add_argument("--folder", type=Path, help="where models are kept between runs; default: nowhere")
    parser.add_argument("--branch-tokens", type=int, default=40_960, help="of each branch")
    parser.add_argument("--joint-tokens", type=int, default=20_480, help="of the joint training")
    parser.add_argument("--without", nargs="+", default=[], choices=MIXTURES, help="mixtures to leave out")
    parser.add_argument("--held-out-tokens", type=int, default=4096, help="of each subject")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    model = find_model(arguments.model)
    for path, _ in SUBJECTS.values():
        find_data(path)
    with tempfile.TemporaryDirectory() as room:
        measure(arguments, model, arguments.folder or Path(room))


def measure(arguments: argparse.Namespace, model: Path, folder: Path) -> None:
    """Make and measure all models in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "train-all.jsonl").is_file():
        write_texts(folder, arguments.branch_tokens + arguments.joint_tokens)
    base = folder / "base"
    make(model, "base", {"rewrite": [TO_FLOAT32]}, folder)
    results: dict[str, Any] = {"base": perplexities(base, folder, arguments.held_out_tokens)}
    budgets = arguments.branch_tokens, arguments.joint_tokens, arguments.held_out_tokens
    for name, given in recipes(folder, *budgets).items():
        if name in arguments.without:
            continue
        make(base, name, given, folder)
        results[name] = perplexities(folder / name, folder, arguments.held_out_tokens)
        if "evaluate" in given:
            results[name]["together"] = curve(folder / name)
        print(name, results[name], file=sys.stderr, flush=True)
    written = write_result(
        "branch_train_mix",
        settings={
            "model": model.name,
            "branch_tokens": arguments.branch_tokens,
            "joint_tokens": arguments.joint_tokens,
            "held_out_tokens": arguments.held_out_tokens,
            "context": CONTEXT,
            "parts": PARTS,
            "stage": stage(arguments.joint_tokens),
        },
        results=results,
        label=arguments.label,
    )
    draw(results, written.with_suffix(".png"))


def draw(results: dict[str, Any], path: Path) -> None:
    """Perplexity over the tokens of joint training, a line for each of the models that are trained together."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, found in results.items():
        if "together" not in found:
            continue
        joint = found["together"][-PARTS - 1 :]
        tokens = [0]
        for row in joint[1:]:
            tokens.append(tokens[-1] + row["tokens"])
        axes.plot(tokens, [row["perplexity"] for row in joint], marker="o", label=name)
    axes.set(xlabel="tokens of joint training", ylabel="perplexity on all three subjects")
    axes.legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
