from matrix_row import Row

OPTIONS = {"block": 8, "refresh": 40, "columns": 2, "diagonals": 1}
ROWS = [
    Row("vertical_slash", OPTIONS, degenerate={"dense_len": 4096}, bidirectional=False),
]
