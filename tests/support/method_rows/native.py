from matrix_row import Row

BECAUSE = "its gates are never 0 or 1"
ROWS = [
    Row(
        "native",
        {"block": 8, "density": 0.35, "window": 5},
        no_degenerate_because=BECAUSE,
        bidirectional=False,
    ),
    Row(
        "native",
        {"block": 8, "density": 0.35, "window": 20, "query": "token"},
        no_degenerate_because=BECAUSE,
        bidirectional=False,
    ),
]
