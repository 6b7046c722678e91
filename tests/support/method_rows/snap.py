from matrix_row import Row

OPTIONS = {"interval": 13, "window": 4, "budget": 12, "kernel": 3}
ROWS = [
    Row("snap", OPTIONS, degenerate={"budget": 4096}, bidirectional=False),
]
