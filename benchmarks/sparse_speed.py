"""Time of sparse attention against dense attention on the same tokens: its gather alone, a layer's prompt, one token.

python benchmarks/sparse_speed.py --threads 1
"""

from collections.abc import Callable
from typing import Any

from common import alternate, in_a_row, parser_of, set_threads, write_result

GEOMETRY = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "value_dim": 64}
SCALING = GEOMETRY["head_dim"] ** -0.5
DENSITY = 0.1
# A layer's cores for one token by name, options beside them; each attends 1,024 tokens.
DECODING: dict[str, tuple[str, dict[str, Any]]] = {
    "quest, pages of 64": ("quest", {"block": 64, "budget": 1024}),
    "quest, pages of 16": ("quest", {"block": 16, "budget": 1024}),
    "means of the block before": ("sparse", {"blocks": 16}),
}


def main() -> None:
    """Measure and write."""
    parser = parser_of(__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="tokens of a prompt")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096, 8192, 32_768], help="tokens before one")
    parser.add_argument(
        "--repeats", type=int, default=3, help="of each prompt; one token is repeated 15 times as often"
    )
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    results = {
        "gather": [gather(block, arguments.prompts[-1], arguments.repeats) for block in (64, 128)],
        "prompt": [prompt(length, arguments.repeats) for length in arguments.prompts],
        "token": [token(length, 15 * arguments.repeats) for length in arguments.contexts],
    }
    settings = {**GEOMETRY, "batch": 1, "dtype": "float32", "density": DENSITY, "repeats": arguments.repeats}
    write_result("sparse_speed", settings=settings, results=results, label=arguments.label)


def drawn(length: int) -> tuple[Any, Any, Any]:
    """Query, key and value of some tokens."""
    import torch

    generator = torch.Generator().manual_seed(0)
    heads = (GEOMETRY["num_heads"], GEOMETRY["num_kv_heads"], GEOMETRY["num_kv_heads"])
    query, key, value = (torch.randn(1, n, length, GEOMETRY["head_dim"], generator=generator) for n in heads)
    return query, key, value


def dense(query: Any, key: Any, value: Any) -> Callable[[], object]:
    """Causal softmax by torch's own kernel."""
    import torch.nn.functional as F

    return lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALING, enable_gqa=True)


def gather(block: int, length: int, repeats: int) -> dict[str, Any]:
    """The executor with a choice by chance at hand."""
    import torch

    from attnconv.attention_modules.sparse.executors.gathered import attend_gathered
    from attnconv.attention_modules.sparse.slots.selectors import Forced, TopBlocks, indices_of

    query, key, value = drawn(length)
    blocks, heads = length // block, GEOMETRY["num_kv_heads"]
    number = torch.arange(blocks)[None]
    shares = torch.rand(1, heads, blocks, blocks, generator=torch.Generator().manual_seed(0))
    keep = TopBlocks(density=DENSITY).keep(shares, number, Forced().of(number, blocks))
    indices = indices_of(keep, number, int(keep.sum(-1).max()))
    queries = query.view(1, heads, -1, blocks, block, GEOMETRY["head_dim"]).transpose(2, 3)
    keys, values = (t.view(1, heads, blocks, block, -1) for t in (key, value))
    cases = {
        "dense": dense(query, key, value),
        "gathered": lambda: attend_gathered(queries, keys, values, indices, scaling=SCALING),
    }
    with torch.inference_mode():
        seconds = alternate(cases, repeats=repeats)
    share = float(keep.sum()) / (heads * blocks * (blocks + 1) / 2)
    row = {"block": block, "tokens": length, "blocks_attended": share, "seconds": seconds}
    row["times_as_fast"] = seconds["dense"] / seconds["gathered"]
    print(row)
    return row


def prompt(length: int, repeats: int) -> dict[str, Any]:
    """Whole layers' attention over a prompt, choices included."""
    import torch

    from attnconv.attention_modules import Geometry, create

    query, key, value = drawn(length)
    cores = {
        "xattention": create("xattention", Geometry(**GEOMETRY), density=DENSITY),
        "block means": create("sparse", Geometry(**GEOMETRY), density=DENSITY),
    }
    cases = {"dense": dense(query, key, value)}
    cases |= {name: lambda core=core: core(query, key, value, scaling=SCALING) for name, core in cores.items()}
    with torch.inference_mode():
        seconds = alternate(cases, repeats=repeats)
    row = {"tokens": length, "seconds": seconds}
    row["times_as_fast"] = {name: seconds["dense"] / seconds[name] for name in cores}
    print(row)
    return row


def token(length: int, repeats: int) -> dict[str, Any]:
    """One new token after so many, against `softmax` through its state, which is grouped SDPA."""
    import torch

    from attnconv.attention_modules import Geometry, Tokens, create

    query, key, value = drawn(length)
    new = drawn(1)
    cases: dict[str, Callable[[], object]] = {}
    with torch.inference_mode():
        for name, (method, options) in {"dense": ("softmax", {}), **DECODING}.items():
            core = create(method, Geometry(**GEOMETRY), **options)
            state = core.new_state()
            state.append(Tokens(key, value))
            if core.earlier_queries:
                near = query[:, :, -core.earlier_queries :]
                state.queries.append(Tokens(near, near[..., :0]))
            cases[name] = lambda core=core, state=state: core(*new, scaling=SCALING, state=state)
        turns = {"in_turns": alternate(cases, repeats=repeats, warmup=2), "in_a_row": in_a_row(cases, repeats=repeats)}
    row: dict[str, Any] = {"tokens": length, "seconds": turns}
    row["times_as_fast"] = {
        turn: {name: seconds["dense"] / seconds[name] for name in DECODING} for turn, seconds in turns.items()
    }
    print(row)
    return row


if __name__ == "__main__":
    main()
