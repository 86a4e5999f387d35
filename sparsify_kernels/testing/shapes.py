"""Shapes to test a kernel on: the usual, 1, a prime, one below and one above a block, empty."""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "ATTENTION_SHAPES",
    "KEY_SHAPES",
    "MERGE_SHAPES",
    "WINDOW_SHAPES",
    "AttentionShape",
    "KeyShape",
    "MergeShape",
    "WindowShape",
]


class AttentionShape(NamedTuple):
    """Samples, heads, queries, keys, width of queries and keys, width of values (0: no v)."""

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    value_dim: int


class KeyShape(NamedTuple):
    """Samples and tokens."""

    batch: int
    tokens: int


class MergeShape(NamedTuple):
    """Samples, tokens, slots, width of the tokens, width of the metric."""

    batch: int
    tokens: int
    slots: int
    dim: int
    metric_dim: int


class WindowShape(NamedTuple):
    """Tokens, windows, places down and across a window, heads, width of a head."""

    tokens: int
    windows: int
    height: int
    width: int
    heads: int
    dim: int


ATTENTION_SHAPES = (
    AttentionShape(2, 2, 4, 6, 8, 8),
    AttentionShape(1, 1, 1, 1, 1, 1),
    AttentionShape(3, 1, 1, 41, 16, 5),  # one query
    AttentionShape(3, 2, 41, 1, 16, 16),  # one key
    AttentionShape(2, 3, 9, 13, 7, 0),  # primes, scores only
    AttentionShape(1, 2, 63, 65, 16, 24),  # one below and one above a block of 64
    AttentionShape(0, 2, 5, 7, 8, 8),  # no samples
    AttentionShape(2, 2, 0, 5, 8, 8),  # no queries
    AttentionShape(2, 2, 5, 0, 8, 8),  # no keys
)

KEY_SHAPES = (
    KeyShape(3, 100),
    KeyShape(4, 1),
    KeyShape(4, 2),
    KeyShape(4, 3),
    KeyShape(4, 4),
    KeyShape(3, 5),
    KeyShape(2, 41),
    KeyShape(2, 63),
    KeyShape(2, 65),
    KeyShape(1, 341),
    KeyShape(0, 9),
    KeyShape(2, 0),
)

MERGE_SHAPES = (
    MergeShape(2, 12, 3, 8, 4),
    MergeShape(1, 1, 1, 1, 1),
    MergeShape(3, 41, 11, 9, 5),
    MergeShape(2, 65, 63, 7, 16),
    MergeShape(2, 7, 7, 3, 2),  # every token a key
    MergeShape(2, 33, 1, 17, 3),  # all tokens to one key
    MergeShape(0, 9, 2, 4, 4),
    MergeShape(2, 0, 1, 4, 4),
)

WINDOW_SHAPES = (
    WindowShape(40, 5, 4, 4, 2, 8),  # half of the places
    WindowShape(1, 1, 1, 1, 1, 1),
    WindowShape(64, 1, 8, 8, 3, 32),  # all places
    WindowShape(63, 2, 8, 8, 1, 24),
    WindowShape(3, 41, 2, 3, 2, 5),  # most windows empty
    WindowShape(17, 2, 1, 11, 1, 7),  # primes, a window of one row
    WindowShape(130, 1, 12, 12, 2, 33),  # one above a block of 128
    WindowShape(0, 3, 2, 2, 2, 4),  # no tokens
)
