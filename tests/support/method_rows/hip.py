from matrix_row import Row

ROWS = [
    Row("hip", {"block": 4, "blocks": 4}, degenerate={"blocks": 4096}, bidirectional=False),
]
