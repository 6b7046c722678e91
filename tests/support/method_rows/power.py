from matrix_row import Row

ROWS = [
    Row("power", {"block": 4, "local_blocks": 0}, degenerate={"local_blocks": 4096}, bidirectional=False),
]
