"""Rendered performances with questions that are true by construction: the built-in data set."""
