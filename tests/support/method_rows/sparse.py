from matrix_row import Row

ROWS = [
    Row("sparse", {"block": 8, "mass": 0.4}, degenerate={"mass": 1.0}, bidirectional=False),
    Row(
        "sparse",
        {"block": 8, "summary": "boxes", "query": "first", "blocks": 4},
        degenerate={"blocks": 4096},
        bidirectional=False,
    ),
]
