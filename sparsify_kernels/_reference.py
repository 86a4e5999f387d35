"""What the plain PyTorch implementations share: the accumulation dtype, masking that stops NaN, and a deterministic
segment sum."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(kernel: Callable[P, R]) -> Callable[P, R]:
    """Run ``kernel`` with autocast off: autocast reaches into Python kernels too and would round their matrix
    products to bf16."""

    @functools.wraps(kernel)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return kernel(*args, **kwargs)

    return run


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def masked(x: Tensor, valid: Tensor) -> Tensor:
    """``x`` [..., L, d] with zeros where ``valid`` [..., L] is False. A select, not a product: 0 * NaN is NaN."""
    return torch.where(valid.unsqueeze(-1), x, 0.0)


def segment_sum(rows: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Sums rows [N, ...] with the same ``segment`` [N] into [segments, ...]; rows of segment -1 are left out.

    Every segment is summed in ascending order of n on every run. ``index_add_`` does that on a CPU; on other devices
    it adds atomically, and the sorting ``index_put_`` takes its place.
    """
    total = rows.new_zeros((segments + 1, *rows.shape[1:]))  # the last one takes what is left out
    target = torch.where(segment < 0, segments, segment)
    if rows.device.type == "cpu":
        total.index_add_(0, target, rows)
    else:
        total.index_put_((target,), rows, accumulate=True)
    return total[:segments]
