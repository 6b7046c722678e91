"""Sparse attention: exact softmax over a chosen part of the context."""
