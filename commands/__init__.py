"""The commands of `attnconv`, one file for each family, and how the command line talks."""
