"""Planning: what a model's attention is, and what will be done to each module."""
