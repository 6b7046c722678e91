from matrix_row import Row

AGENTS = "weights are a product of two softmaxes, whatever the number of agents"
ROWS = [
    Row("agent", {"num_agents": 6}, no_degenerate_because=AGENTS, causal=False),
    Row("agent", {"num_agents": 80, "kernel_size": 0}, no_degenerate_because=AGENTS, causal=False),
    Row("agent", {"num_agents": 1, "kernel_size": 7}, no_degenerate_because=AGENTS, causal=False),
]
