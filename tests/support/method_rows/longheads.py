from matrix_row import Row

ROWS = [
    Row("longheads", {"block": 8, "blocks": 4}, degenerate={"blocks": 4096}, bidirectional=False),
]
