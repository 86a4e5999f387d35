"""Tensors of arbitrary bits, of any dtype: what is only copied must come through unchanged, NaN too."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_kernels.testing.inputs import relayout

__all__ = ["assert_same_bits", "payload", "placed"]


def payload(shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator | None = None) -> Tensor:
    """Arbitrary bits, NaN and infinities among them."""
    x = torch.empty(shape, dtype=dtype)
    if x.numel():
        x.view(torch.uint8).random_(0, 2 if dtype == torch.bool else 256, generator=g)
    return x


def placed(x: Tensor, layout: str) -> Tensor:
    """``relayout`` of the bits: PyTorch does not stack every dtype, but the integers of their sizes."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(x.dtype.itemsize, x.dtype)
    return relayout(x.view(integers), layout).view(x.dtype)


def assert_same_bits(ours: Tensor, expected: Tensor, what: str = "result") -> None:
    assert ours.dtype == expected.dtype, what
    assert ours.shape == expected.shape, what
    if expected.numel():
        assert torch.equal(ours.cpu().contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)), what
