from matrix_row import WIDE, Row

ROWS = [
    Row("lolcats", {"window": 5}, degenerate=WIDE),
    Row("lolcats", {"window": 64, "state_per": "kv_head", "mixing": 0.5}, degenerate=WIDE),
    Row("lolcats", {"window": 1, "feature_map": "hedgehog_fla"}, degenerate=WIDE, for_long_tests=True),
    Row("lolcats", {"window": 9, "feature_map": "t2r", "feature_dim": 24}, degenerate=WIDE, for_long_tests=True),
    Row(
        "lolcats",
        {"window": 9, "feature_map": "elu", "initialization": "kaiming"},
        degenerate=WIDE,
        for_long_tests=True,
    ),
    Row("lolcats", {"window": 9, "feature_map": "exp", "state_per": "kv_head"}, degenerate=WIDE, for_long_tests=True),
    Row("lolcats", {"window": 9, "feature_map": "taylor", "feature_dim": 5}, degenerate=WIDE, for_long_tests=True),
    Row("lolcats", {"window": 9, "window_terms": "absolute", "mixing": 0.01}, degenerate=WIDE),
    Row("lolcats", {"window": 5, "num_sinks": 3}, degenerate=WIDE),
    Row("lolcats", {"window": 9, "num_sinks": 2, "window_terms": "absolute", "state_per": "kv_head"}, degenerate=WIDE),
]
