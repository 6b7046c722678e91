from matrix_row import PURE, Row

ROWS = [
    Row("gated", no_degenerate_because=PURE, bidirectional=False, walks=True),
    Row(
        "gated",
        {"gate": "scalar", "activation": "softmax", "normalizer": True, "state_per": "kv_head"},
        no_degenerate_because=PURE,
        bidirectional=False,
        walks=True,
    ),
    Row(
        "gated",
        {"gate_from": "keys", "gate": "vector", "activation": "softmax", "normalizer": True, "output_gate": False},
        no_degenerate_because=PURE,
        bidirectional=False,
        walks=True,
        for_long_tests=True,
    ),
    Row(
        "gated",
        {"gate_from": "keys", "gate": "scalar", "gate_temperature": 1.0, "activation": "silu", "output_gate_rank": 3},
        no_degenerate_because=PURE,
        bidirectional=False,
        walks=True,
        for_long_tests=True,
    ),
]
