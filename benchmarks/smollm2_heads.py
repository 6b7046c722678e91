"""SmolLM2-135M with some KV heads full and the others streaming: what it finds in long prompts, perplexity and cache.

    attnconv plan MODEL --budget kv_bytes=25% --calibrate books_train.jsonl.gz -o plan.yaml --importance heads.json
    python benchmarks/smollm2_heads.py --recipe plan.yaml
    python benchmarks/smollm2_heads.py --recipe duo --set attention.0.heads.importance=heads.json

More `--set attention.0.heads.top=20 --set attention.1.options.window=512` keep fewer heads and wider windows.

Nothing is trained here. Prompts are those of `smollm2_passkeys.py`, one at a time, answered greedily in fp32 by the
model and by its conversion; none of them chose a head. Perplexity is that of WikiText-2 valid (detokenised), first
5,120 tokens, context 1,024. The cache is what all states hold in bf16 after 32,768 tokens and one more, room for others
included, against keys and values of all tokens.
"""

import argparse
import gzip
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import find_data, find_model, parser_of, set_threads, write_result
from smollm2_passkeys import NEW_TOKENS, PROMPTS, chosen
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnconv import convert_model
from attnconv.convert import converted_modules
from attnconv.convert.planning.probe import probe
from attnconv.evaluate import perplexity
from attnconv.evaluate.tasks.retrieval import continuations
from attnconv.evaluate.tasks.textfile import load_tokens
from attnconv.recipes import load_recipe

TEXT, TOKENS, CONTEXT, LONG = "eval/wikitext2_valid_detok.txt.gz", 5_120, 1_024, 32_768
HALVES = ("first", "other")


def main() -> None:
    """Ask the model, convert it in memory, ask again."""
    parser = parser_of(__doc__, model="smollm2-135m-instruct")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--recipe", default="duo")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--without-teacher", action="store_true", help="the model itself was measured in another run")
    parser.add_argument("--half", choices=HALVES, help="half of the prompts of each length; both, if left out")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    folder = find_model(arguments.model)
    with gzip.open(find_data(PROMPTS), "rt", encoding="utf-8") as lines:
        prompts = chosen([json.loads(line) for line in lines])
    if arguments.half is not None:
        prompts = {group: rows for group, rows in prompts.items() if group.endswith(arguments.half)}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    recipe = load_recipe(arguments.recipe, arguments.changes)
    modules = [module for module in probe(model.config, type(model)) if module.self_attention]
    results: dict[str, Any] = {}
    if not arguments.without_teacher:
        results["teacher"] = measured(model, tokenizer, prompts)
    convert_model(model, recipe)
    results["converted"] = measured(model, tokenizer, prompts)
    results["cache"] = cache_bytes(model, modules)
    results["heads"] = heads(model, modules)
    write_result(
        "smollm2_heads",
        settings={
            "model": folder.name,
            "recipe": Path(arguments.recipe).stem,
            "rules": [rule.compact() for rule in recipe.attention],
            "prompts": PROMPTS,
            "text": TEXT,
        },
        results=results,
        label=arguments.label,
    )


def measured(model: Any, tokenizer: Any, prompts: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Perplexity, and by group how many numbers are found."""
    ids = load_tokens(find_data(TEXT), tokenizer, context=CONTEXT, limit=TOKENS)
    found: dict[str, Any] = {"perplexity": perplexity(model, ids, context=CONTEXT).perplexity}
    print(found, flush=True)
    for group, rows in prompts.items():
        tokens = [tokenizer(row["prompt"])["input_ids"] for row in rows]
        texts = [continuations(model, tokenizer, [one], NEW_TOKENS)[0] for one in tokens]
        right = [str(row["answer"]) in text for row, text in zip(rows, texts, strict=True)]
        found[group] = {"found": sum(right), "of": len(right), "tokens": sum(map(len, tokens)) / len(tokens)}
        print(group, found[group], flush=True)
    return found


def cache_bytes(model: Any, modules: list[Any]) -> dict[str, Any]:
    """Bytes that all layers hold, counted on tensors without memory."""
    cores = {name: module.attnconv for name, module in converted_modules(model).items()}
    held, dense = 0, 0
    for module in modules:
        geometry = module.geometry
        own = (LONG + 1) * geometry.num_kv_heads * (geometry.head_dim + geometry.value_dim) * 2
        dense += own
        if module.name not in cores:
            held += own
            continue
        core = cores[module.name].to("meta")
        state, sizes = core.new_state(), (geometry.num_heads, geometry.num_kv_heads)
        # Autocast does not know the device that stands for one.
        with torch.no_grad(), mock.patch.object(torch, "autocast", return_value=nullcontext()):
            for length in (LONG, 1):
                shapes = [(1, heads, length, geometry.head_dim) for heads in sizes]
                query, key = (torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in shapes)
                core(query, key, key[..., : geometry.value_dim], scaling=0.125, state=state)
        held += state.nbytes
    return {"tokens": LONG + 1, "dense": dense, "held": held, "share": held / dense}


def heads(model: Any, modules: list[Any]) -> dict[str, Any]:
    """KV heads that stay full, by layer."""
    entries = model.config.attnconv["modules"]
    full = {}
    for index, module in enumerate(modules):
        entry = entries.get(module.name)
        parts = [] if entry is None else entry["options"].get("parts", [])
        kept = [group for part in parts if part["method"] == "softmax" for group in part["groups"]]
        full[index] = list(range(module.geometry.num_kv_heads)) if entry is None else kept
    return {"full": sum(map(len, full.values())), "of": sum(m.geometry.num_kv_heads for m in modules), "layers": full}


if __name__ == "__main__":
    main()
