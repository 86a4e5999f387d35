"""Counted operations: every formula by hand on a small case."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sparsify_kernels.flops  # noqa: F401
from sparsify_kernels import (
    KeyTokens,
    Windows,
    attention_scores,
    key_tokens,
    merge_tokens,
    random_mask,
    window_attention,
)


def count(function):
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops(), result


def windows_of(*sizes):
    """Windows of 2 x 2 places that hold ``sizes`` tokens, in the order of the tokens."""
    n = sum(sizes)
    start = torch.tensor([0, *sizes]).cumsum(0)
    return Windows(torch.arange(n), start, torch.cat([torch.arange(size) for size in sizes]), None)


def test_window_attention_counts_the_pairs_that_share_a_window():
    """Windows of 1, 0, 4 and 3 tokens: 1 + 16 + 9 = 26 pairs, not the 4 * 16 of dense windows; 2 heads of 8."""
    qkv = torch.randn(8, 3, 2, 8, requires_grad=True)
    bias = torch.randn(2, 3, 3, requires_grad=True)
    forward, out = count(lambda: window_attention(qkv, bias, windows_of(1, 0, 4, 3)))
    assert forward == 26 * 2 * (2 * 8 + 2 * 8)
    assert count(lambda: out.sum().backward())[0] == 26 * 2 * 5 * 2 * 8
    other = window_attention(qkv.detach(), bias, windows_of(1, 0, 4, 3))
    assert count(lambda: other.sum().backward())[0] == 26 * 2 * 2 * 2 * 8, "of the bias alone: logits and gO v^T"


def test_attention_scores():
    q, k, v = (torch.randn(3, 2, n, d, requires_grad=True) for n, d in ((5, 16), (7, 16), (7, 4)))
    pairs = 3 * 2 * 5 * 7
    forward, found = count(lambda: attention_scores(q, k, v))
    assert forward == pairs * 2 * (16 + 4)
    assert count(lambda: found.output.sum().backward())[0] == pairs * 2 * (3 * 16 + 2 * 4)
    forward, found = count(lambda: attention_scores(q, k))
    assert forward == pairs * 2 * 16
    assert count(lambda: found.received.sin().sum().backward())[0] == pairs * 2 * 3 * 16


def test_merging_counts_similarities():
    x, metric = torch.randn(2, 9, 5, requires_grad=True), torch.randn(2, 9, 3)
    keys = KeyTokens(torch.tensor([[0, 3], [1, -1]]), torch.tensor([2, 1]))
    forward, merged = count(lambda: merge_tokens(x, metric, keys))
    assert forward == 2 * 9 * 2 * 2 * 3
    assert count(lambda: merged.tokens.sum().backward())[0] == 0


@pytest.mark.parametrize(
    "function", [lambda: random_mask(torch.randn(2, 8, 3), seed=1), lambda: key_tokens(torch.randn(2, 8))]
)
def test_masking_and_picking_multiply_nothing(function):
    assert count(function)[0] == 0
