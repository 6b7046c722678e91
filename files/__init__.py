"""Files and folders: safe, atomic and fast ways to read and write them; knows nothing of models."""
