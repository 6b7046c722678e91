"""Causal linear attention on mapped features."""
