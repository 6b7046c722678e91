"""Rows of the invariant matrix: a file for each method, found by being here, with its `ROWS`."""
