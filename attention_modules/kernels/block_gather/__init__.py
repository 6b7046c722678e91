"""Softmax over chosen blocks of keys, gathered: forward, backward, and one token against a cache."""
