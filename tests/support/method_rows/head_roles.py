from matrix_row import Row

ROWS = [Row("head_roles", {"window": 5, "num_sinks": 2}, degenerate={"window": 4096})]
