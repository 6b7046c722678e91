"""Milliseconds a token of SmolLM2-135M behind a long context: dense and by sparse methods, in turns.

    python benchmarks/sparse_decode.py --threads 1

The whole model decodes, as `generate` calls it, in fp32; the context's keys and values are drawn by chance, for how
long a step takes does not hang on them. Each method attends 1,024 tokens a step, `delta` in 25 of its 30 layers.
"""

import argparse
import copy
import statistics
import time
from typing import Any

from common import find_model, parser_of, set_threads, write_result

METHODS: dict[str, list[dict[str, Any]]] = {
    "quest, pages of 16": [{"layers": "all", "method": "quest", "options": {"block": 16, "budget": 1024}}],
    "quest, pages of 64": [{"layers": "all", "method": "quest", "options": {"block": 64, "budget": 1024}}],
    "delta, every 6th layer dense": [
        {"layers": {"every": 6, "offset": 0}, "method": "delta", "options": {"role": "select"}},
        {"layers": "all", "method": "delta", "options": {"role": "reuse"}},
    ],
}


def main() -> None:
    """Measure and write."""
    parser = parser_of(__doc__, model="smollm2-135m-instruct")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192], help="tokens before the first")
    parser.add_argument("--steps", type=int, default=24, help="tokens decoded by each at each context")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    folder = find_model(arguments.model)
    import torch
    from transformers import AutoModelForCausalLM

    import attnconv
    from attnconv.recipes import Recipe

    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    models = {"dense": dense}
    for name, rules in METHODS.items():
        # The same weights, which are read and never written.
        shared = {id(parameter): parameter for parameter in dense.parameters()}
        models[name] = copy.deepcopy(dense, shared)
        attnconv.convert_model(models[name], Recipe.model_validate({"name": "decode", "attention": rules}))
    with torch.inference_mode():
        rows = [row for context in arguments.contexts for row in measured(models, context, arguments.steps)]
    settings = {"model": folder.name, "dtype": "float32", "methods": METHODS, "steps": arguments.steps}
    write_result("sparse_decode", settings=settings, results={"rows": rows}, label=arguments.label)


def measured(models: dict[str, Any], context: int, steps: int) -> list[dict[str, Any]]:
    """Each model's median and the share of tokens that it attended, behind one context; they take turns."""
    import torch

    from attnconv.attention_modules.counting import counting
    from attnconv.compat import cache_argument

    caches = {name: filled(model, context) for name, model in models.items()}
    token = torch.tensor([[100]])
    given = {
        name: {cache_argument(model.forward): caches[name], "use_cache": True, "logits_to_keep": 1}
        for name, model in models.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(steps):
        for name, model in models.items():
            began = time.perf_counter()
            model(token, **given[name])
            seconds[name].append(time.perf_counter() - began)
    rows = []
    for name, model in models.items():
        density = 1.0
        if name != "dense":
            with counting(model) as counter:
                model(token, **given[name])
            density = counter.total.density
        # The first steps make what is kept of each page.
        row = {"model": name, "context": context, "ms_per_token": 1000 * statistics.median(seconds[name][steps // 4 :])}
        row |= {"tokens_attended": density}
        rows.append(row)
        print(row, flush=True)
    for row in rows:
        row["of_dense"] = row["ms_per_token"] / rows[0]["ms_per_token"]
    return rows


def filled(model: Any, context: int) -> Any:
    """A cache that holds so many drawn tokens."""
    import torch
    from transformers import DynamicCache

    from attnconv.attention_modules import Tokens
    from attnconv.convert.surgery.cache_layer import layer_of
    from attnconv.convert.surgery.swap import converted_modules

    config, generator = model.config, torch.Generator().manual_seed(0)
    cache, cores = DynamicCache(config=config), [module.attnconv for module in converted_modules(model).values()]
    for layer in range(config.num_hidden_layers):
        shape = 1, config.num_key_value_heads, context, config.hidden_size // config.num_attention_heads
        keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
        if cores:
            layer_of(cache, layer).state_of(cores[layer]).append(Tokens(keys, values))
        else:
            cache.update(keys, values, layer)
    return cache


if __name__ == "__main__":
    main()
