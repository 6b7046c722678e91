"""A converted SmolLM2's states and decoding time at 512 and at 8,192 tokens of context, and the teacher's beside it.

python benchmarks/decode_state.py --model models/smollm2-135m-instruct
"""

import statistics
import time

from common import find_model, parser_of, set_threads, write_result

CONTEXTS = (512, 8_192)
WINDOW = 64
CHUNK = 512


def prefill(model, context: int):
    """Run `context` random tokens in chunks; the cache and the next token."""
    import torch
    from transformers import DynamicCache

    from attnconv.compat import cache_argument

    torch.manual_seed(0)
    cache = DynamicCache(config=model.config)
    for chunk in torch.randint(100, model.config.vocab_size, (1, context)).split(CHUNK, dim=1):
        logits = model(chunk, **{cache_argument(model.forward): cache}, use_cache=True, logits_to_keep=1).logits
    return cache, logits[:, -1:].argmax(-1)


def measure(model, steps: int) -> dict[str, object]:
    """Bytes after the prefill, and milliseconds a token; the contexts take turns token by token."""
    import torch

    from attnconv.compat import cache_argument
    from attnconv.evaluate.bench.cache_size import held_bytes

    name = cache_argument(model.forward)

    with torch.inference_mode():
        runs = [prefill(model, context) for context in CONTEXTS]
        held = [held_bytes(cache) for cache, _ in runs]
        tokens = [token for _, token in runs]
        seconds: list[list[float]] = [[] for _ in CONTEXTS]
        for _ in range(steps):
            for index, (cache, _) in enumerate(runs):
                began = time.perf_counter()
                logits = model(tokens[index], **{name: cache}, use_cache=True, logits_to_keep=1).logits
                seconds[index].append(time.perf_counter() - began)
                tokens[index] = logits[:, -1:].argmax(-1)
    # The first steps fill what the allocator and the threads need.
    medians = [1000 * statistics.median(values[steps // 4 :]) for values in seconds]
    return {
        "contexts": [
            {"context": context, "state_bytes": size, "ms_per_token": milliseconds}
            for context, size, milliseconds in zip(CONTEXTS, held, medians, strict=True)
        ],
        "bytes_ratio": held[-1] / held[0],
        "time_ratio": medians[-1] / medians[0],
    }


def main() -> None:
    """Measure both models."""
    parser = parser_of(__doc__, model="smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=64, help="tokens decoded at each context")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    folder = find_model(arguments.model)
    import torch
    from transformers import AutoModelForCausalLM

    from attnconv.convert import convert_model

    results = {}
    for name in ("converted", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, arguments.dtype)).eval()
        if name == "converted":
            convert_model(model, "lolcats", window=WINDOW)
        results[name] = measure(model, arguments.steps)
    settings = {"model": folder.name, "dtype": arguments.dtype, "method": "lolcats", "window": WINDOW, "chunk": CHUNK}
    write_result(
        "decode_state", settings={**settings, "steps": arguments.steps}, results=results, label=arguments.label
    )


if __name__ == "__main__":
    main()
