from matrix_row import Row

REASON = "its start is softmax attention, from which any other prefix leads away; test_ntk_prefix.py holds the start"
# Not drawn long: all its paths write every weight out.
ROWS = [Row("ntk_prefix", no_degenerate_because=REASON, walks=True)]
