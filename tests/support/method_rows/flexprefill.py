from matrix_row import Row

OPTIONS = {"block": 8, "refresh": 40, "mass": 0.5, "divergence": 0.3}
ROWS = [
    Row("flexprefill", OPTIONS, degenerate={"mass": 1.0}, bidirectional=False),
]
