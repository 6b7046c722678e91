from matrix_row import Row

REASON = "its start is softmax attention, from which other numbers lead away; test_calibrate_heads.py holds the start"
# Not drawn long: all its paths write every weight out.
ROWS = [Row("calibrate_heads", {"cap": 0.4, "num_sinks": 2, "identity": 0.2}, no_degenerate_because=REASON, walks=True)]
