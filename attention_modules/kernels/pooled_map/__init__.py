"""Attention pooled over blocks of keys, which gates of sparse attention learn from."""
