from matrix_row import Row

ROWS = [
    Row(
        "dsa",
        {"block": 8, "density": 0.4, "budget": None, "index_dim": 8},
        degenerate={"density": 1.0},
        bidirectional=False,
    ),
    Row("dsa", {"budget": 24, "index_dim": 8}, degenerate={"budget": 4096}, bidirectional=False),
]
