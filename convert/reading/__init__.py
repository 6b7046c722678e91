"""Reading a checkpoint: where it comes from, what its headers say, whether it is whole."""
