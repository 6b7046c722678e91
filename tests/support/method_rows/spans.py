from matrix_row import Row

ROWS = [
    Row("spans", {"block": 4, "base": 6.0, "growth": 0.1}, degenerate={"growth": 1.0}, bidirectional=False),
]
