from matrix_row import PURE, Row

ROWS = [
    Row("gated_delta", no_degenerate_because=PURE, bidirectional=False, walks=True),
    Row(
        "gated_delta",
        {"activation": "none", "output_norm": False, "output_gate": False, "state_per": "kv_head"},
        no_degenerate_because=PURE,
        bidirectional=False,
        walks=True,
    ),
]
