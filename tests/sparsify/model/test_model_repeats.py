"""Gradients are the same bits on every run: threads of a CPU add nothing up as they come by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sparsify.batch import Masking, Questions, Video
from sparsify.config import Config
from sparsify.model import SparsifyModel
from sparsify.model.layers import select_rows

Batch = tuple[Video, Questions, Masking]


def test_select_rows_is_indexing() -> None:
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0]]], requires_grad=True)
    picked = select_rows(x, torch.tensor([[2, 0], [2, 2]]))
    assert picked.tolist() == [[[[5.0, 6.0]], [[1.0, 2.0]]], [[[5.0, 6.0]], [[5.0, 6.0]]]]
    slope = torch.tensor([[[[1.0, 2.0]], [[10.0, 20.0]]], [[[100.0, 200.0]], [[1000.0, 2000.0]]]])
    (gradient,) = torch.autograd.grad(picked, x, slope)
    assert gradient.tolist() == [[[10.0, 20.0]], [[0.0, 0.0]], [[1101.0, 2202.0]]]


@pytest.mark.usefixtures("_two_threads")
def test_what_two_threads_have_of_one_row_is_added_up_in_order() -> None:
    """Shared out in halves, a row's third gradient comes to one thread when its first two have not to the other."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 128, 128, generator=g, requires_grad=True)
    slope = torch.randn(6, 128, 128, generator=g)
    expected = torch.stack([slope[0], slope[1] + slope[2] + slope[3] + slope[4], slope[5]])
    for _ in range(20):
        (gradient,) = torch.autograd.grad(select_rows(x, torch.tensor([0, 1, 1, 1, 1, 2])), x, slope)
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("merged", [True, False])
def test_no_gradient_of_masked_training_is_scattered(
    merged: bool,
    tiny: Callable[..., Config],
    make_model: Callable[..., SparsifyModel],
    make_batch: Callable[..., Batch],
    scattered: Any,
) -> None:
    config = tiny(merge__enabled=merged, train__matching=1.0)
    model = make_model(config).train()
    video, questions, masking = make_batch(config)
    label = torch.zeros(len(questions.video_index), dtype=torch.int64)
    with scattered:
        out = model(video, questions, masking, label)
        (F.cross_entropy(out.answer, label) + F.cross_entropy(out.matching, questions.video_index)).backward()
    assert sum(p.grad is not None for p in model.parameters()) > 100
    assert scattered.found == []
