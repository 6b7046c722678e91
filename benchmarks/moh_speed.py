"""Time of attention with heads left out by `moh`, gates included, against all heads by the model's own kernel, fp32.

    python benchmarks/moh_speed.py --threads 1

What is timed is the attention function of one converted layer, between projections, with 3 KV heads of 64 and 3 query
heads each, of which a token uses 1, 2 or all 3; for prompts also 4 KV heads, of which it uses 2. Gates are drawn.
Asked for, in time: a prompt of 2,048 with half of the pairs 0.80 x, a token after 2,048 with 1 of 3 KV heads 0.40 x.
"""

from typing import Any

from common import alternate, in_a_row, parser_of, set_threads, write_result

HEAD_DIM, GROUP = 64, 3
# KV heads, and how many of them each token uses.
PROMPTS, TOKENS = [(4, 2), (3, 1), (3, 2), (3, 3)], [(3, 1), (3, 2), (3, 3)]


def main() -> None:
    """Measure and write."""
    parser = parser_of(__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1024, 2048, 4096], help="tokens of a prompt")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 1024, 2048, 8192, 32_768], help="tokens read")
    parser.add_argument("--repeats", type=int, default=5, help="of each prompt; a token is repeated 40 times as often")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    results = {
        "prompt": [times(length, length, *case, arguments.repeats) for length in arguments.prompts for case in PROMPTS],
        "token": [times(1, length, *case, 40 * arguments.repeats) for length in arguments.contexts for case in TOKENS],
    }
    settings = {"head_dim": HEAD_DIM, "query_heads_each": GROUP, "dtype": "float32", "repeats": arguments.repeats}
    write_result("moh_speed", settings=settings, results=results, label=arguments.label)


def times(queries: int, keys: int, kv_heads: int, active: int, repeats: int) -> dict[str, Any]:
    """Attention of the newest tokens to all keys: by all heads without a gate, and by those chosen."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from attnconv import convert_model
    from attnconv.convert.surgery.attention_function import attnconv_attention
    from attnconv.convert.surgery.calls import CallContext

    heads = kv_heads * GROUP
    sizes = {"hidden_size": heads * HEAD_DIM, "intermediate_size": 8, "vocab_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=HEAD_DIM)
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    module = convert_model(model, "moh", unit="group", active=active).model.layers[0].self_attn
    torch.nn.init.normal_(module.attnconv.routed_router)
    context = CallContext(hidden_states=torch.randn(1, queries, heads * HEAD_DIM))
    tensors = [
        torch.randn(1, n, length, HEAD_DIM) for n, length in ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    ]
    cases = {
        "dense": lambda: own(module, *tensors, None, scaling=HEAD_DIM**-0.5),
        "chosen": lambda: attnconv_attention(module, *tensors, None, attnconv_context=context, scaling=HEAD_DIM**-0.5),
    }
    with torch.inference_mode():
        seconds = alternate(cases, repeats=repeats, warmup=3)
        row_seconds = in_a_row(cases, repeats=repeats)
    shares = {
        "in_turns": seconds["chosen"] / seconds["dense"],
        "in_a_row": row_seconds["chosen"] / row_seconds["dense"],
    }
    row = {
        "queries": queries,
        "keys": keys,
        "kv_heads": kv_heads,
        "used": active,
        "seconds": {"in_turns": seconds, "in_a_row": row_seconds},
        "share_of_dense": shares,
    }
    print(
        queries, keys, f"{active} of {kv_heads}", {name: round(share, 3) for name, share in shares.items()}, flush=True
    )
    return row


if __name__ == "__main__":
    main()
