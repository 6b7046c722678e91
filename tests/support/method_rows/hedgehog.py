from matrix_row import PURE, Row

ROWS = [
    Row("hedgehog", no_degenerate_because=PURE),
    Row("hedgehog", {"feature_map": "hedgehog_fla", "state_per": "kv_head"}, no_degenerate_because=PURE),
]
