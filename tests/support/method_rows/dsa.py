from matrix_row import Row

ROWS = [
    Row(
        "dsa",
        # With 0.4 two blocks of one of 1,100 tokens are so near a tie that fp32 and fp64 choose otherwise.
        {"block": 8, "density": 0.35, "budget": None, "index_dim": 8},
        degenerate={"density": 1.0},
        bidirectional=False,
    ),
    Row("dsa", {"budget": 24, "index_dim": 8}, degenerate={"budget": 4096}, bidirectional=False),
]
