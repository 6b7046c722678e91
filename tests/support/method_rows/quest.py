from matrix_row import Row

ROWS = [
    Row("quest", {"block": 4, "budget": 20}, degenerate={"budget": 4096}, bidirectional=False),
    Row("quest", {"block": 8, "mass": 0.5, "dense_len": 24}, degenerate={"mass": 1.0}, bidirectional=False),
]
