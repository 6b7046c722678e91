from matrix_row import Row

ROWS = [
    Row("xattention", {"block": 8, "stride": 4, "mass": 0.6}, degenerate={"mass": 1.0}, bidirectional=False),
    Row(
        "xattention",
        {"block": 16, "stride": 4, "density": 0.3, "sink_blocks": 0, "local_blocks": 1, "dense_len": 40},
        degenerate={"density": 1.0},
        bidirectional=False,
    ),
]
