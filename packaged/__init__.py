"""What ships inside the package for trying things with no download."""
