from matrix_row import Row

ROWS = [
    Row("moa", {"num_experts": 2}, degenerate={"num_experts": 1}, widened=(2, 2)),
    Row("moa", {"num_experts": 2, "active": 1}, degenerate={"num_experts": 1}, widened=(2, 1)),
    Row("moa", {"num_experts": 2, "share_kv": True}, degenerate={"num_experts": 1}, widened=(2, 1)),
]
