"""Cases for window_attention: PyTorch's accuracy, forward and backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparsify_kernels.testing.fuzz.parts import (
    FLOATS,
    Kernels,
    Sums,
    draw,
    flags,
    floats,
    layouts,
    orders,
    put,
    reference,
    seeds,
    wide,
    widths,
)
from sparsify_kernels.testing.inputs import relayout, window_inputs
from sparsify_kernels.testing.shapes import WindowShape


@dataclasses.dataclass(frozen=True)
class Case:
    """Plain values; the tensors follow from them."""

    filled: float
    windows: int
    height: int
    width: int
    heads: int
    dim: int
    dtype: str
    kind: str
    scale: bool
    region: bool
    cosine: bool
    layout: str
    other_layout: str
    wanted: tuple[bool, bool, bool]
    seed: int

    @staticmethod
    def strategy() -> st.SearchStrategy[Case]:
        side = st.one_of(st.integers(1, 9), st.just(12))
        return st.builds(
            Case, st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.integers(1, 5), side, side, st.integers(1, 3),
            widths, floats, st.sampled_from(["normal", "equal", "large", "zeros"]), flags, flags, flags,
            layouts, layouts, st.tuples(flags, flags, flags), seeds,
        )  # fmt: skip

    def sums(self, kernels: Kernels, others: int = 0) -> Iterator[Sums]:
        """Results, then gradients; the reference's in as many other orders of channels, too."""
        g, dtype = torch.Generator().manual_seed(self.seed), FLOATS[self.dtype]
        tokens = int(self.filled * self.windows * self.height * self.width)
        shape = WindowShape(tokens, self.windows, self.height, self.width, self.heads, self.dim)
        drawn = window_inputs(shape, dtype, scale=self.scale, region=self.region, seed=self.seed)
        qkv = drawn["qkv"]
        if self.kind == "equal" and tokens:
            qkv = qkv[:1].expand_as(qkv)
        qkv = qkv * {"large": 3.0, "zeros": 0.0}.get(self.kind, 1.0)
        args = [qkv, drawn["bias"], drawn["scale"], *drawn["windows"]]
        names = (self.layout, self.other_layout, self.layout, *[self.other_layout] * 4)
        ours_args = [None if a is None else relayout(a, n) for a, n in zip(args, names, strict=True)]
        ours = kernels("window_attention", *ours_args, self.cosine)
        channels = [None, *orders(others, self.dim, seed=self.seed)]
        near = [self._forward(args, order) for order in channels]
        truth = reference("window_attention", *wide(args), self.cosine)
        for name, o, t, p, *more in zip(("output", "lse"), ours, truth, *near, strict=True):
            yield Sums(name, o, p, t, others=tuple(more))

        slope, wanted = draw(truth[0].shape, g, dtype), list(self.wanted)
        ours_slope = relayout(slope, self.other_layout)
        back = kernels("window_attention_backward", ours_slope, *ours_args, ours[1], self.cosine, wanted)
        near = [self._backward(slope, args, p[1], order) for p, order in zip(near, channels, strict=True)]
        exact = reference("window_attention_backward", slope.double(), *wide(args), truth[1], self.cosine, wanted)
        for name, o, t, p, *more in zip(("dqkv", "dbias", "dscale"), back, exact, *near, strict=True):
            yield Sums(name, o, p, t, others=tuple(more))

    def _forward(self, args: list[Any], order: list[Tensor] | None) -> tuple[Tensor, ...]:
        """What the reference gives with channels in this order, put back where they were."""
        if order is None:
            return reference("window_attention", *args, self.cosine)
        output, lse = reference("window_attention", put(args[0], 3, order[0]), *args[1:], self.cosine)
        return put(output, 2, order[0].argsort()), lse

    def _backward(self, slope: Tensor, args: list[Any], lse: Tensor, order: list[Tensor] | None) -> tuple[Tensor, ...]:
        """The same for the gradients."""
        rest = (*args[1:], lse, self.cosine, list(self.wanted))
        if order is None:
            return reference("window_attention_backward", slope, args[0], *rest)
        qkv = put(args[0], 3, order[0])
        dqkv, dbias, dscale = reference("window_attention_backward", put(slope, 2, order[0]), qkv, *rest)
        return put(dqkv, 3, order[0].argsort()), dbias, dscale
