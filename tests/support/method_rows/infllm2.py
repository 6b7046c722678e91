from matrix_row import Row

OPTIONS = {"block": 8, "kernel": 4, "stride": 2, "local_blocks": 1, "blocks": 2, "dense_len": 24}
ROWS = [
    Row("infllm2", OPTIONS, degenerate={"dense_len": 4096}, bidirectional=False),
]
