from matrix_row import Row

ROWS = [
    Row("lserve", {"block": 8, "part": 4, "budget": 24}, degenerate={"budget": 4096}, bidirectional=False),
]
