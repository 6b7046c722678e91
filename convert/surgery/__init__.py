"""The surgery: modules swapped in place, the attention function they run through, and their cache layers."""
