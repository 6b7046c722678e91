from matrix_row import WIDE, Row

ROWS = [
    Row("lola", {"window": 5, "cache_size": 3}, degenerate=WIDE, bidirectional=False, walks=True),
    Row(
        "lola",
        {"window": 40, "cache_size": 9, "feature_map": "elu", "state_per": "kv_head", "mixing": 0.5},
        degenerate=WIDE,
        bidirectional=False,
        walks=True,
        for_long_tests=True,
    ),
    Row(
        "lola",
        {"window": 1, "cache_size": 40, "window_terms": "absolute"},
        degenerate=WIDE,
        bidirectional=False,
        walks=True,
        for_long_tests=True,
    ),
]
