"""SmolLM2-135M converted by the command line with a few minutes of healing: perplexity, time and peak memory.

    python benchmarks/smollm2_lolcats.py --model models/smollm2-135m-instruct

61,440 tokens of attention transfer and 30,720 of LoRA on Wikipedia paragraphs, window 64, length 512, bf16; measured
on WikiText-2 valid (detokenised), first 5,120 tokens, context 1,024. The same tokens spent as `lolcats-plus` does best:

    python benchmarks/smollm2_lolcats.py --recipe lolcats-plus --set attention.0.options.window=48 \
        --set stages.0.tokens=20480 --set stages.1.tokens=71680 --set stages.1.sequence_length=1024
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import Finished, attnconv_command, find_data, find_model, parser_of, run_command, set_threads, write_result

TRAIN = "train/wikipedia_paragraphs.jsonl.gz"
EVALUATE = "eval/wikitext2_valid_detok.txt.gz"
TOKENS, CONTEXT = 5_120, 1_024
SETTINGS = {
    "attention.0.options.window": 64,
    "stages.*.sequence_length": 512,
    "stages.*.precision": "bf16",
    "stages.0.tokens": 61_440,
    "stages.1.tokens": 30_720,
}


def main() -> None:
    """Convert, then evaluate what was saved against the teacher."""
    parser = parser_of(__doc__, model="smollm2-135m-instruct")
    parser.add_argument("--recipe", default="lolcats")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, help="keep the converted model in this folder")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    model = find_model(arguments.model)
    text = find_data(EVALUATE)
    with tempfile.TemporaryDirectory() as scratch:
        output = arguments.output or Path(scratch) / "out"
        conversion, receipt = convert(model, arguments.recipe, output, SETTINGS, arguments.changes)
        window = ["--text", text, "--tokens", str(TOKENS), "--context", str(CONTEXT), "--dtype", "bfloat16"]
        window += ["--output", Path(scratch) / "results"]
        evaluated = run_command(attnconv_command("-q", "eval", output, "--against", model, *window, "--json"))
    (task,) = json.loads(evaluated.stdout)["tasks"].values()
    measured = next(row for row in task["figures"] if row["metric"] == "perplexity" and not row["group"])
    write_result(
        "smollm2_lolcats",
        settings={
            "model": model.name,
            "recipe": arguments.recipe,
            "train": TRAIN,
            "evaluate": EVALUATE,
            "changes": {**SETTINGS, **dict(change.split("=", 1) for change in arguments.changes)},
        },
        results={
            "teacher": measured["base"],
            "converted": measured["model"],
            "stages": receipt.get("metrics"),
            "path_use": receipt.get("path_use"),
            "conversion_seconds": conversion.seconds,
            "peak_bytes": conversion.peak_bytes,
        },
        label=arguments.label,
    )


def convert(
    model: Path, recipe: str, output: Path, settings: Mapping[str, object], more: Sequence[str]
) -> tuple[Finished, dict[str, Any]]:
    """Convert by the command line with these settings and `KEY=VALUE` more of them: the command's end, the receipt."""
    data = {"path": str(find_data(TRAIN)), "field": "text"}
    evaluation = {"path": str(find_data(EVALUATE)), "tokens": TOKENS, "context": CONTEXT}
    changes = [f"{key}={value}" for key, value in settings.items()]
    changes += [f"data={json.dumps(data)}", f"evaluate={json.dumps(evaluation)}", *more]
    flags = [part for change in changes for part in ("--set", change)]
    conversion = run_command(attnconv_command("convert", model, "--recipe", recipe, "--output", output, *flags))
    print(conversion.stdout)
    return conversion, json.loads((output / "receipt.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
