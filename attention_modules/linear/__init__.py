"""Linear attention: constant-size states instead of a growing cache."""
