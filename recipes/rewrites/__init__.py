"""Rewrites: each file here is one kind that a recipe can ask for, with its settings, and registers itself."""
