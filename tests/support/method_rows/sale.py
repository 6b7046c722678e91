from matrix_row import Row

ROWS = [
    Row(
        "sale",
        {"block": 8, "local_blocks": 1, "dense_len": 0, "threshold": 0.5},
        degenerate={"threshold": 0.0},
        bidirectional=False,
    ),
]
