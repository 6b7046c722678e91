"""Every recipe for causal text models on SmolLM2-135M: parameters, state, speed and perplexity, as one table.

    python benchmarks/method_table.py --model models/smollm2-135m-instruct --write-readme

Each recipe converts the model with 20,480 tokens of healing on Wikipedia paragraphs, in equal parts for each of its
stages, length 512, bf16; measured on WikiText-2 valid (detokenised), first 5,120 tokens, context 1,024. A finished row
is kept: the same command goes on after an interruption, and a run with `--only` leaves its rows to later runs.
"""

import argparse
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import (
    REPOSITORY,
    RESULTS,
    attnconv_command,
    commit_state,
    find_data,
    find_model,
    parser_of,
    run_command,
    set_threads,
    write_result,
)

TRAIN, EVALUATE = "train/wikipedia_paragraphs.jsonl.gz", "eval/wikitext2_valid_detok.txt.gz"
EVALUATED, CONTEXT = 5_120, 1_024
SEQUENCE, STATE_TOKENS = 512, 8_192
ROWS = RESULTS / "method_table.partial"
BEGIN, END, AFTER = "<!-- methods:begin -->", "<!-- methods:end -->", "<!-- measured:end -->"
HEADER = (
    "| recipe | new parameters | state at {state:,} tokens | prefill of {length:,} tokens | decoding after them "
    "| perplexity after the swap | after healing |\n|---|---:|---:|---:|---:|---:|---:|"
)
EXPLANATION = """\
Every shipped recipe for causal text models on {model}, in {dtype} with {threads} threads on {cpu}. State is what one
sequence holds; times are multiples of the base's, measured in turns with it: the median of all turns, with quartiles.
Perplexity is that of WikiText-2 valid (detokenised), first {evaluated:,} tokens, context {context:,}, which the window
of `sliding-window` covers, in bfloat16 where a recipe heals. Healing took {tokens:,} tokens in all, in equal parts for
each of a recipe's stages: this shows how methods start and how fast they heal, not how good they become. The script is
`method_table.py`, and all figures are in [`{file}`](benchmarks/results/{file})."""

Row = dict[str, Any]


def main() -> None:
    """Measure all rows that are not kept from earlier runs, then write the table."""
    parser = parser_of(__doc__, model="smollm2-135m-instruct")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help="these recipes alone")
    parser.add_argument("--tokens", type=int, default=20_480, help="tokens of healing, all stages together")
    parser.add_argument("--length", type=int, default=2_048, help="tokens of context where time is measured")
    parser.add_argument("--repeats", type=int, default=5, help="prefills that are timed")
    parser.add_argument("--restart", action="store_true", help="forget the rows that are kept")
    parser.add_argument("--write-readme", action="store_true", help="put the table into README.md")
    given = parser.parse_args()
    if given.write_readme and given.only:
        parser.error("--write-readme takes all recipes: leave out --only")
    set_threads(given.threads)
    model, train, text = find_model(given.model), find_data(TRAIN), find_data(EVALUATE)
    recipes = causal_recipes(model)
    if unknown := sorted(set(given.only or ()) - set(recipes)):
        parser.error(f"--only {' '.join(unknown)}: the recipes are {', '.join(recipes)}")
    import torch

    settings = {
        "model": model.name,
        "dtype": json.loads((model / "config.json").read_text(encoding="utf-8")).get("dtype", "float32"),
        "threads": torch.get_num_threads(),
        "train": TRAIN,
        "evaluate": {"text": EVALUATE, "tokens": EVALUATED, "context": CONTEXT},
        "state_tokens": STATE_TOKENS,
        "sequence_length": SEQUENCE,
        **{name: getattr(given, name) for name in ("tokens", "length", "repeats")},
    }
    if given.restart:
        ROWS.unlink(missing_ok=True)
    rows = collect(given.only or recipes, settings, ROWS, lambda name: measure(name, model, train, text, given))
    path = write_result("method_table", settings=settings, results={"rows": rows}, label=given.label)
    if given.write_readme:
        readme = REPOSITORY / "README.md"
        block = markdown(json.loads(path.read_text(encoding="utf-8")), path.name)
        readme.write_text(with_block(readme.read_text(encoding="utf-8"), block), encoding="utf-8")
    if not given.only:
        ROWS.unlink()


def causal_recipes(model: Path) -> list[str]:
    """The shipped recipes for text that convert a causal model; not the demo's, nor those made for encoders."""
    from attnconv.errors import RecipeError
    from attnconv.evaluate.diagnose.inspection import inspect_model
    from attnconv.recipes import list_recipes, load_recipe

    found = []
    for name in list_recipes():
        recipe = load_recipe(name)
        data = recipe.data
        # Rewritten weights, with experts say, are another model than the one that methods are compared on.
        other = recipe.rewrite or name.endswith("-encoder")
        # What goes by a file about the model cannot be run without it.
        other = other or any(isinstance(rule.heads, dict) for rule in recipe.attention)
        other = other or (data is not None and (data.embedded or data.image_field is not None))
        try:
            if not other and inspect_model(str(model), recipe=recipe).num_converted:
                found.append(name)
        except RecipeError:
            # It names layers that a smaller model does not have.
            continue
    return found


def collect(
    names: Iterable[str], settings: Mapping[str, Any], kept: Path, measured: Callable[[str], Row]
) -> dict[str, Row]:
    """The row of each recipe, kept in a file as soon as it is there; one that fails leaves the others to be measured.

    Rows of other settings, or of a recipe that was another then, are measured again. `measured` may raise `SystemExit`.
    """
    from attnconv.evaluate.engine.journal import Journal
    from attnconv.recipes import recipe_text

    keys, failures = {}, []
    with Journal(kept) as journal:
        for name in names:
            facts = json.dumps([settings, recipe_text(name)], sort_keys=True)
            keys[name] = f"{name}/{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
            if keys[name] in journal:
                print(f"{name}: kept from an earlier run", flush=True)
                continue
            print(f"{name} ...", flush=True)
            try:
                journal.add(keys[name], measured(name))
            except SystemExit as error:
                failures.append(f"{name}: {error}")
        if failures:
            sys.exit("\n".join([*failures, f"The other rows are in {kept}; the same command tries these again."]))
        return {name: journal[key] for name, key in keys.items()}


def measure(name: str, model: Path, train: Path, text: Path, given: argparse.Namespace) -> Row:
    """Convert by a recipe, measure, and delete the conversion."""
    from attnconv.evaluate.diagnose.inspection import inspect_model
    from attnconv.recipes import load_recipe

    recipe = load_recipe(name)
    flags = [part for change in changes(len(recipe.stages), given.tokens, train, text) for part in ("--set", change)]
    bench = ["--contexts", str(given.length), "--repeats", str(given.repeats), "--training-contexts", ""]
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / name
        converted = run_command(attnconv_command("-q", "convert", model, "--recipe", name, "--output", output, *flags))
        benched = run_command(attnconv_command("-q", "bench", output, "--against", model, *bench, "--json"))
        receipt = json.loads((output / "receipt.json").read_text(encoding="utf-8"))
    inspection = inspect_model(str(model), recipe=recipe, lengths=[STATE_TOKENS]).to_dict()
    return {
        **row_of(inspection, receipt["metrics"], json.loads(benched.stdout)["cases"]),
        "convert_seconds": converted.seconds,
        "peak_bytes": converted.peak_bytes,
        **commit_state(),
    }


def changes(num_stages: int, tokens: int, train: Path, text: Path) -> list[str]:
    """What is changed in a recipe: data, and the length of its stages."""
    found = [f"evaluate={json.dumps({'path': str(text), 'tokens': EVALUATED, 'context': CONTEXT})}"]
    if num_stages:
        stage = {"steps": "null", "tokens": tokens // num_stages, "sequence_length": SEQUENCE, "batch_size": 1}
        found += [f"stages.*.{key}={value}" for key, value in {**stage, "precision": "bf16"}.items()]
        found.append(f"data={json.dumps({'path': str(train), 'field': 'text'})}")
    return found


def row_of(inspection: Mapping[str, Any], metrics: Sequence[Row], cases: Sequence[Row]) -> Row:
    """A row from what `inspect` says of a recipe at one length, the receipt's metrics, and the cases of `bench`."""
    (held,) = inspection["footprints"]
    return {
        "parameters": inspection["parameters"],
        "state_bytes": held["after"],
        "base_state_bytes": held["before"],
        **{
            measure: timing([case for case in cases if case["measure"] == measure]) for measure in ("prefill", "decode")
        },
        "stages": list(metrics),
    }


def timing(cases: Iterable[Row]) -> Row:
    """Seconds of model and base, and quartiles of their ratio, turn by turn."""
    from attnconv.evaluate.bench.cases import quartiles

    sides = {case["role"]: case for case in cases}
    if skipped := next((case["skipped"] for case in sides.values() if case["skipped"]), None):
        sys.exit(f"time was not measured: {skipped}")
    model, base = sides["model"], sides["base"]
    turns = [own / other for own, other in zip(model["seconds"], base["seconds"], strict=True)]
    seconds = {role: {key: side[key] for key in ("median", "low", "high")} for role, side in sides.items()}
    return {**seconds, "ratio": dict(zip(("low", "median", "high"), quartiles(turns), strict=True))}


def markdown(document: Mapping[str, Any], file: str) -> str:
    """The paragraph and the table of what `write_result` wrote into this file."""
    from attnconv.formats import perplexity, size

    settings, rows = document["settings"], document["results"]["rows"]
    explanation = EXPLANATION.format(
        **{key: settings[key] for key in ("model", "dtype", "threads", "tokens")},
        cpu=document["hardware"]["cpu"],
        evaluated=settings["evaluate"]["tokens"],
        context=settings["evaluate"]["context"],
        file=file,
    )
    header = HEADER.format(state=settings["state_tokens"], length=settings["length"])
    first = next(iter(rows.values()))
    base = [size(first["base_state_bytes"]), "1", "1", perplexity(first["stages"][0]["perplexity"]), "–"]
    return "\n".join([explanation, "", header, line("the base, softmax", 0, base), *map(table_row, rows.items())])


def table_row(item: tuple[str, Row]) -> str:
    """A recipe's line."""
    from attnconv.formats import perplexity, size

    name, row = item
    swap, *healed = (stage for stage in row["stages"] if stage["stage"] != "teacher")
    spread = [
        "{median:.2f} ({low:.2f}-{high:.2f})".format(**row[measure]["ratio"]) for measure in ("prefill", "decode")
    ]
    after = perplexity(healed[-1]["perplexity"]) if healed else "not trained"
    return line(
        f"`{name}`", row["parameters"], [size(row["state_bytes"]), *spread, perplexity(swap["perplexity"]), after]
    )


def line(name: str, parameters: int, cells: Sequence[str]) -> str:
    """A line of the table."""
    return f"| {' | '.join([name, f'{parameters:,}', *cells])} |"


def with_block(readme: str, block: str) -> str:
    """The README with the block between its markers, which come after the other measurements if there are none yet."""
    if BEGIN not in readme:
        readme = readme.replace(AFTER, f"{AFTER}\n\n{BEGIN}\n{END}", 1)
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{block}\n{END}", readme, count=1, flags=re.DOTALL)


if __name__ == "__main__":
    main()
