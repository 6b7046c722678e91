"""Rewrites: a checkpoint in, an ordinary checkpoint out, tensor by tensor; the result needs nothing of this package."""
