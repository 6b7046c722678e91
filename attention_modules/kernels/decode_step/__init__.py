"""One decoding step of the hybrid."""
