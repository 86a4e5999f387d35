"""key_tokens at B64 N640 and B8 N8192, two fences: against torch.quantile with a sort, and one sort for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_kernels import gather_tokens, key_tokens

SHAPES = [(64, 640), (8, 8192)]


def eager_quantile(scores: Tensor, fence: float) -> tuple[Tensor, Tensor]:
    """As the definition reads: quantiles, a sort for the best, a sort for their order."""
    tokens = scores.shape[1]
    slots = max(1, tokens - 3 * tokens // 4)
    q1, q3 = torch.quantile(scores, torch.tensor([0.25, 0.75]), dim=1)
    count = (scores >= (q3 + fence * (q3 - q1)).unsqueeze(1)).sum(1).clamp(1, slots)
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :slots]
    index = torch.where(torch.arange(slots) < count.unsqueeze(1), best, tokens).sort(dim=1).values
    return torch.where(index == tokens, -1, index), count


def eager_best(scores: Tensor, fence: float) -> tuple[Tensor, Tensor]:
    """The fastest plain formulation we know: one sort serves the quartiles and the choice."""
    tokens = scores.shape[1]
    slots = max(1, tokens - 3 * tokens // 4)
    ranked, order = scores.sort(dim=1, descending=True)

    def quartile(q: float) -> Tensor:
        position = q * (tokens - 1)
        low = int(position)
        a, b = ranked[:, tokens - 1 - low].double(), ranked[:, max(0, tokens - 2 - low)].double()
        return a + (position - low) * (b - a)

    threshold = quartile(0.75) + (fence * (quartile(0.75) - quartile(0.25)) if fence else 0.0)
    count = (ranked[:, :slots] >= threshold.unsqueeze(1)).sum(1).clamp(1, slots)
    index = torch.where(torch.arange(slots) < count.unsqueeze(1), order[:, :slots], tokens).sort(dim=1).values
    return torch.where(index == tokens, -1, index), count


def cases(batch: int, tokens: int, fence: float) -> dict[str, Callable[[], Any]]:
    scores = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(0))
    index, count = key_tokens(scores, fence=fence)
    for other, other_count in (eager_quantile(scores, fence), eager_best(scores, fence)):
        assert torch.equal(other, index)  # no speed-up over something else
        assert torch.equal(other_count, count)
    compiled = torch.compile(eager_best, fullgraph=True)
    return {
        "ours": lambda: key_tokens(scores, fence=fence),
        "eager: quantile and sort": lambda: eager_quantile(scores, fence),
        "eager, best: one sort": lambda: eager_best(scores, fence),
        "torch.compile of the best": lambda: compiled(scores, fence),
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fence", [0.0, 1.5])
@pytest.mark.parametrize("name", list(cases(1, 8, 0.0)))
def test_forward(benchmark: Any, table: Any, shape: tuple[int, int], fence: float, name: str) -> None:
    batch, tokens = shape
    group = f"key_tokens B{batch} N{tokens} fence {fence} fp32"
    table.measure(benchmark, group, name, cases(*shape, fence)[name], 4 * batch * tokens)


@pytest.mark.parametrize("name", ["ours", "eager: gather"])
def test_gather(benchmark: Any, table: Any, name: str) -> None:
    x = torch.zeros(8, 640, 768)
    index = key_tokens(torch.rand(8, 640)).index
    run = {
        "ours": lambda: gather_tokens(x, index),
        "eager: gather": lambda: torch.gather(x, 1, index.clamp(min=0).unsqueeze(-1).expand(-1, -1, 768)),
    }[name]
    table.measure(benchmark, "gather_tokens B8 N640 K160 D768 fp32", name, run, 2 * 8 * 160 * 768 * 4)
