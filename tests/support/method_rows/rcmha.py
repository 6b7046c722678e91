from matrix_row import Row

REASON = "its start is softmax attention, from which any other parameters lead away; test_rcmha.py holds the start"
# Not drawn long: all its paths write every weight out.
ROWS = [Row("rcmha", {"distances": 9}, no_degenerate_because=REASON, bidirectional=False, walks=True)]
