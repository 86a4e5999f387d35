"""Merge every token into its most similar key token."""
