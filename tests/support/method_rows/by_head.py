from matrix_row import Row

SLIDING = {"method": "sliding_window", "options": {"window": 5, "num_sinks": 2}}
LOLCATS = {"method": "lolcats", "options": {"window": 5}}
ROWS = [
    Row(
        "by_head",
        {"parts": [{"groups": [0], "method": "softmax"}, SLIDING]},
        degenerate={"parts": [{"groups": [0], "method": "softmax"}, {**SLIDING, "options": {"window": 4096}}]},
        widened=(2, 2),
    ),
    Row(
        "by_head",
        {"parts": [{"groups": [1], "method": "softmax"}, LOLCATS]},
        degenerate={"parts": [{"groups": [1], "method": "softmax"}, {**LOLCATS, "options": {"window": 4096}}]},
        widened=(2, 2),
    ),
]
