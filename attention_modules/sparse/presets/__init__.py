"""Sparse methods: which slots each one is made of."""
