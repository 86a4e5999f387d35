"""Tokens of an encoder's last stage, made comparable."""

from __future__ import annotations

import torch

from sparsify.model.time import TIME_FEATURES
from sparsify.model.tokens import TokenHead


def test_several_threads_add_up_gradients_in_one_order():
    """Two threads would add up the gradient of an index in any order: runs would not repeat bit for bit."""
    torch.manual_seed(0)
    cells = torch.arange(16)
    head = TokenHead(8, 128, cells // 4, cells % 4)
    x, cell = torch.randn(24, 128, 8), torch.randint(16, (24, 128))
    time, slope = torch.randn(24, 128, TIME_FEATURES), torch.randn(24, 128, 128)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (torch.autograd.grad(head(x, cell, time), list(head.parameters()), slope) for _ in range(20))
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
