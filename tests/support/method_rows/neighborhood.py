from matrix_row import Row

ROWS = [
    Row("neighborhood", {"window": 5, "dilation": 3}, degenerate={"window": 4096, "dilation": 1}),
]
