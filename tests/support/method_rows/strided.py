from matrix_row import Row

ROWS = [
    Row(
        "strided",
        {"block": 4, "stride": 3, "local_blocks": 1},
        degenerate={"local_blocks": 4096},
        bidirectional=False,
    ),
]
