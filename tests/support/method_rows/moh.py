from matrix_row import Row

ALL = {"router": "query_norm", "form": "code", "active": None}
ROWS = [
    Row("moh", {"active": 1, "num_shared": 1}, degenerate=ALL, widened=(2, 1)),
    Row("moh", {"active": 1, "shared": [1], "form": "paper"}, degenerate=ALL, widened=(2, 1)),
    Row("moh", {"unit": "group"}, degenerate=ALL),
    Row("moh", {"router": "query_norm", "active": 1}, degenerate=ALL),
]
