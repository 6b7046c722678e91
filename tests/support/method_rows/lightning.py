from matrix_row import PURE, Row

ROWS = [
    Row("lightning", no_degenerate_because=PURE, bidirectional=False),
    Row(
        "lightning",
        {"decay": "learned", "activation": "none", "state_per": "kv_head", "output_gate": False},
        no_degenerate_because=PURE,
        bidirectional=False,
    ),
]
