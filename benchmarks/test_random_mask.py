"""random_mask on whole pixel blocks, B64 U64 P = 3*32*32, half kept: against memcpy of the bytes moved, and eager.

The op makes its result, so the copy to compare with is the one into fresh memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_kernels import random_mask

B, U, P, K = 64, 64, 3 * 32 * 32, 32


def eager_argsort(x: Tensor) -> Tensor:
    """As most masked autoencoders are written."""
    index = torch.rand(B, U).argsort(dim=1)[:, :K].sort(dim=1).values
    return torch.gather(x, 1, index.unsqueeze(-1).expand(-1, -1, P))


def eager_best(x: Tensor) -> Tensor:
    """The fastest plain formulation we know: no full sort, and whole rows selected from a flat view."""
    index = torch.rand(B, U).topk(K, dim=1, sorted=False).indices.sort(dim=1).values
    return x.view(B * U, P).index_select(0, (index + U * torch.arange(B).unsqueeze(1)).view(-1)).view(B, K, P)


def cases(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    x = torch.zeros(B, U, P, dtype=dtype) + 1
    source, target = x[:, :K].contiguous(), torch.empty(B, K, P, dtype=dtype)
    compiled = torch.compile(eager_best, fullgraph=True)
    return {
        "ours": lambda: random_mask(x, 0.5, seed=3),
        "memcpy": lambda: target.copy_(source),
        "memcpy into fresh memory": lambda: source.clone(),
        "eager: rand, argsort, gather": lambda: eager_argsort(x),
        "eager, best": lambda: eager_best(x),
        "torch.compile of the best": lambda: compiled(x),
    }


NAMES = list(cases(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=["uint8", "fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_forward(benchmark: Any, table: Any, dtype: torch.dtype, name: str) -> None:
    moved = 2 * B * K * P * dtype.itemsize
    table.measure(benchmark, f"random_mask B{B} U{U} P{P} keep 1/2 {dtype}", name, cases(dtype)[name], moved)


@pytest.mark.parametrize("name", ["ours", "eager: zeros, scatter"])
def test_backward(benchmark: Any, table: Any, name: str) -> None:
    index = random_mask(torch.zeros(B, U, 0), seed=3).index
    grad = torch.ones(B, K, P)
    run = {
        "ours": lambda: torch.ops.sparsify_kernels.random_mask_backward(grad, index, U),
        "eager: zeros, scatter": lambda: torch.zeros(B, U, P).scatter_(1, index.unsqueeze(-1).expand(B, K, P), grad),
    }[name]
    table.measure(benchmark, f"random_mask backward B{B} U{U} P{P} fp32", name, run, (B * K + B * U) * P * 4)
