from matrix_row import Row

ROWS = [
    Row(
        "bigbird",
        {"block": 4, "random_blocks": 2, "local_blocks": 1},
        degenerate={"local_blocks": 4096},
        bidirectional=False,
    ),
]
