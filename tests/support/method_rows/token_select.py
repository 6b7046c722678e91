from matrix_row import Row

# Of random queries about a fifth are alike.
OPTIONS = {"budget": 12, "similarity": 0.1, "interval": 7, "sink_blocks": 2, "local_blocks": 3}
ROWS = [
    Row("token_select", OPTIONS, degenerate={"budget": 4096}, bidirectional=False),
]
