from matrix_row import Row

ROWS = [
    Row("moba", {"block": 8, "top_k": 3}, degenerate={"top_k": 4096}, bidirectional=False),
]
