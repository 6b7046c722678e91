from matrix_row import Row

ROWS = [
    Row("seer", {"block": 8, "mass": 0.4, "gate_dim": 8}, degenerate={"mass": 1.0}, bidirectional=False),
    Row(
        "seer",
        {"block": 8, "density": 0.4, "query": "token", "gate_dim": 8},
        degenerate={"density": 1.0},
        bidirectional=False,
    ),
]
