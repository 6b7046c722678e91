"""Time of one decoding step of softmax through its state against SDPA on the same keys, 9/3 heads of 64, 32k tokens.

python benchmarks/growing_state.py
"""

from common import alternate, parser_of, set_threads, write_result

GEOMETRY = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "value_dim": 64}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--repeats", type=int, default=100)
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    import torch

    from attnconv.attention_modules import Geometry, Tokens, create

    torch.manual_seed(0)
    scaling, heads, shared = GEOMETRY["head_dim"] ** -0.5, GEOMETRY["num_heads"], GEOMETRY["num_kv_heads"]
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        core = create("softmax", Geometry(**GEOMETRY))
        state = core.new_state()

        def draw(heads: int, length: int, dtype=dtype) -> torch.Tensor:
            return torch.randn(1, heads, length, GEOMETRY["head_dim"]).to(dtype)

        prompt, new = arguments.tokens - 1, (draw(heads, 1), draw(shared, 1), draw(shared, 1))
        keys, values = draw(shared, arguments.tokens), draw(shared, arguments.tokens)

        def step(core=core, new=new, state=state) -> None:
            core(*new, scaling=scaling, state=state)

        def grouped(new=new, keys=keys, values=values) -> None:
            rows = new[0].unflatten(1, (shared, -1)).squeeze(3)
            torch.nn.functional.scaled_dot_product_attention(rows, keys, values, scale=scaling)

        def sdpa(new=new, keys=keys, values=values) -> None:
            torch.nn.functional.scaled_dot_product_attention(new[0], keys, values, scale=scaling, enable_gqa=True)

        with torch.inference_mode():
            state.append(Tokens(keys[:, :, :prompt], values[:, :, :prompt]))
            # The first new token makes room for those to come.
            step()
            seconds = alternate({"sdpa": sdpa, "grouped sdpa": grouped, "state": step}, repeats=arguments.repeats)
        rows.append({"dtype": str(dtype).removeprefix("torch."), "seconds": seconds})
        rows[-1] |= {"of_grouped": seconds["state"] / seconds["grouped sdpa"]}
        rows[-1] |= {"of_sdpa": seconds["state"] / seconds["sdpa"]}
        print(rows[-1])
    settings = {**GEOMETRY, "tokens": arguments.tokens, "batch": 1, "repeats": arguments.repeats}
    write_result("growing_state", settings=settings, results={"steps": rows}, label=arguments.label)


if __name__ == "__main__":
    main()
