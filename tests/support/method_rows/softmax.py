from matrix_row import Row

ROWS = [
    Row("softmax", degenerate={}),
]
