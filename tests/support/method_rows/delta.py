from matrix_row import Row

# A layer that reads what another chose is no module by itself: see test_delta.py.
ROWS = [
    Row("delta", {"block": 4, "budget": 12}, degenerate={}, bidirectional=False),
]
