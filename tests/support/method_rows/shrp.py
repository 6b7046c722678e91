from matrix_row import Row

ALL = {"keep": None, "expander": 0}
ROWS = [
    Row("shrp", {"keep": 1, "expander": 5}, degenerate=ALL, widened=(2, 2)),
]
