"""Attention inside windows of packed tokens, however many of them are there."""
