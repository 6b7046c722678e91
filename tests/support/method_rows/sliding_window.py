from matrix_row import WIDE, Row

ROWS = [
    Row("sliding_window", {"window": 5, "num_sinks": 0}, degenerate=WIDE),
    Row("sliding_window", {"window": 7, "num_sinks": 3}, degenerate=WIDE),
    Row("sliding_window", {"window": 80, "num_sinks": 4}, degenerate=WIDE),
]
