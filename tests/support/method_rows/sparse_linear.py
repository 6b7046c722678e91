from matrix_row import Row

ROWS = [
    Row("sparse_linear", {"block": 8, "density": 0.35}, degenerate={"density": 1.0}, bidirectional=False),
]
