from matrix_row import PURE, Row

ROWS = [
    Row("linear", no_degenerate_because=PURE),
    Row("linear", {"feature_map": "elu", "projection": "none"}, no_degenerate_because=PURE),
    Row("linear", {"feature_map": "relu", "normalizer": False, "state_per": "kv_head"}, no_degenerate_because=PURE),
    Row("linear", {"feature_map": "dpfp", "state_per": "kv_head"}, no_degenerate_because=PURE, for_long_tests=True),
    Row("linear", {"feature_map": "taylor", "feature_dim": 7}, no_degenerate_because=PURE, for_long_tests=True),
]
