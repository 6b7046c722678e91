"""Evaluation tasks: each file is one kind of question put to a model."""
