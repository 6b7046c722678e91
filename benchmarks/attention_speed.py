"""Time of one lolcats attention forward alone against SDPA, 9/3 heads of 64 in fp32, at 4k, 8k and 16k tokens.

python benchmarks/attention_speed.py
"""

import math

from common import alternate, parser_of, set_threads, write_result

LENGTHS = (4_096, 8_192, 16_384)
GEOMETRY = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "value_dim": 64}
WINDOW = 64


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    import torch

    from attnconv.attention_modules import Geometry, create

    torch.manual_seed(0)
    scaling = GEOMETRY["head_dim"] ** -0.5
    core = create("lolcats", Geometry(**GEOMETRY), window=WINDOW)
    rows = []
    for length in LENGTHS:
        query = torch.randn(1, GEOMETRY["num_heads"], length, GEOMETRY["head_dim"])
        key, value = torch.randn(2, 1, GEOMETRY["num_kv_heads"], length, GEOMETRY["head_dim"])

        def sdpa(query=query, key=key, value=value) -> None:
            torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scaling, enable_gqa=True
            )

        def lolcats(query=query, key=key, value=value) -> None:
            core(query, key, value, scaling=scaling)

        with torch.inference_mode():
            seconds = alternate({"sdpa": sdpa, "lolcats": lolcats}, repeats=arguments.repeats)
        rows.append({"length": length, "speedup": seconds["sdpa"] / seconds["lolcats"], "seconds": seconds})
        print(rows[-1])
    doublings = math.log2(LENGTHS[-1] / LENGTHS[0])
    growth = rows[-1]["seconds"]["lolcats"] / rows[0]["seconds"]["lolcats"]
    write_result(
        "attention_speed",
        settings={**GEOMETRY, "window": WINDOW, "dtype": "float32", "batch": 1, "repeats": arguments.repeats},
        results={"lengths": rows, "factor_per_doubling": growth ** (1 / doublings)},
        label=arguments.label,
    )


if __name__ == "__main__":
    main()
