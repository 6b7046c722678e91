from matrix_row import Row

ROWS = [
    Row("recycled", {"interval": 7, "budget": 12}, degenerate={"budget": 4096}, bidirectional=False),
]
