from matrix_row import Row

REASON = "its start is softmax attention, from which any other parameters lead away; test_cca.py holds the start"
ROWS = [
    Row("cca", no_degenerate_because=REASON, bidirectional=False),
    Row(
        "cca",
        {"depthwise_kernel": 3, "grouped_kernel": 1, "mixing": 1.0, "value_shift": 1.0, "norm": True},
        no_degenerate_because=REASON,
        bidirectional=False,
    ),
]
