"""Cases for merge_tokens: the same assignment, PyTorch's accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparsify_kernels.testing.asserts import assert_assignment, assert_same
from sparsify_kernels.testing.fuzz.parts import (
    FLOATS,
    VALID,
    Kernels,
    Sums,
    batches,
    draw,
    draw_valid,
    flags,
    floats,
    layouts,
    lengths,
    orders,
    poison,
    put,
    reference,
    seeds,
    wide,
    widths,
)
from sparsify_kernels.testing.inputs import merge_keys, relayout


@dataclasses.dataclass(frozen=True)
class Case:
    """Plain values; the tensors follow from them."""

    batch: int
    tokens: int
    slots: int
    dim: int
    metric_dim: int
    dtype: str
    metric_dtype: str
    metric: str
    weight: str
    valid: str
    spiked: bool
    layout: str
    other_layout: str
    wanted: tuple[bool, bool]
    grads: tuple[bool, bool]
    seed: int

    @staticmethod
    def strategy() -> st.SearchStrategy[Case]:
        metrics = ["integers", "signs", "zeros", "small", "not finite", "real"]
        return st.builds(
            Case, batches, lengths, st.integers(1, 80), st.one_of(st.just(0), widths),
            st.one_of(st.just(0), widths), floats, floats, st.sampled_from(metrics),
            st.sampled_from(["none", "quarters", "real", "tiny", "huge"]), st.sampled_from(VALID), flags, layouts,
            layouts, st.tuples(flags, flags), st.tuples(flags, flags), seeds,
        )  # fmt: skip

    def sums(self, kernels: Kernels, others: int = 0) -> Iterator[Sums]:
        """Results, then gradients; those of weights, sums over channels, in as many other orders of them, too."""
        g, dtype = torch.Generator().manual_seed(self.seed), FLOATS[self.dtype]
        shape = (self.batch, self.tokens)
        valid = draw_valid(self.valid, shape, g)
        named = merge_keys(torch.ones(shape, dtype=torch.bool) if valid is None else valid, self.slots, g)
        x = draw((*shape, self.dim), g, dtype)
        if self.spiked and x.numel():
            spikes = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0], dtype=dtype)
            x.view(-1)[torch.randint(0, x.numel(), (4,), generator=g)] = spikes
        metric = self._metric(g).to(FLOATS[self.metric_dtype])
        weight = self._weight(g)
        weight = None if weight is None else poison(weight, valid, g)
        args: list[Any] = [poison(x, valid, g), poison(metric, valid, g), *named, weight, valid]
        names = (self.layout, self.other_layout, self.layout, self.layout, self.other_layout, self.layout)
        ours_args = [None if a is None else relayout(a, n) for a, n in zip(args, names, strict=True)]
        ours = kernels("merge_tokens", *ours_args)
        plain = reference("merge_tokens", *args)
        if self.metric == "real":  # near-ties may go either way: the rest is compared for our own assignment
            assert_assignment(ours[2], args[1], *named, valid)
            args[1] = _metric_of(ours[2], self.slots)
            plain = reference("merge_tokens", *args)
        assert_same(ours[2], plain[2], "assign")
        truth = reference("merge_tokens", *wide(args))
        yield Sums("tokens", ours[0], plain[0], truth[0])
        yield Sums("size", ours[1], plain[1], truth[1])

        # The reference multiplies x by a gradient of tokens that nobody gave, and an infinity by 0 is NaN.
        grads = (self.grads[0] or self.spiked, self.grads[1])
        slopes = [draw(t.shape, g, t.dtype) if on else None for t, on in zip(plain, grads, strict=False)]
        given: list[Any] = [*slopes, args[0], args[4]]
        placed = [None if t is None else relayout(t, self.other_layout) for t in (*given, *plain)]
        back = kernels("merge_tokens_backward", *placed, list(self.wanted))
        near = reference("merge_tokens_backward", *given, *plain, list(self.wanted))
        exact = reference("merge_tokens_backward", *wide(given), *truth, list(self.wanted))
        more = [self._weights_gradient(given, plain, order) for order in orders(others, self.dim, seed=self.seed)]
        yield Sums("dx", back[0], near[0], exact[0])
        yield Sums("dweight", back[1], near[1], exact[1], others=tuple(more))

    def _weights_gradient(self, given: list[Any], plain: tuple[Tensor, ...], order: list[Tensor]) -> Tensor:
        """The reference's with channels in another order."""
        slope, grad_size, x, weight = given
        placed = (put(slope, 2, *order), grad_size, put(x, 2, *order), weight, put(plain[0], 2, *order), *plain[1:])
        return reference("merge_tokens_backward", *placed, list(self.wanted))[1]

    def _metric(self, g: torch.Generator) -> Tensor:
        shape = (self.batch, self.tokens, self.metric_dim)
        if self.metric == "real":
            return torch.randn(shape, generator=g, dtype=torch.float64)
        whole = torch.randint(-3, 4, shape, generator=g).double()
        if self.metric == "not finite" and whole.numel():
            spikes = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=torch.float64)
            whole.view(-1)[torch.randint(0, whole.numel(), (3,), generator=g)] = spikes
        # Their products are exact in fp32 too, as subnormals.
        small = 2.0**-20 if self.metric_dtype == "fp16" else 2.0**-70
        return {"signs": whole.sign(), "zeros": whole * -0.0, "small": whole * small}.get(self.metric, whole)

    def _weight(self, g: torch.Generator) -> Tensor | None:
        if self.weight == "none":
            return None
        accumulation = torch.float64 if self.dtype == "fp64" else torch.float32
        quarters = torch.randint(0, 4, (self.batch, self.tokens), generator=g).to(accumulation) * 0.75
        real = torch.rand((self.batch, self.tokens), generator=g).to(accumulation)
        factor = {"tiny": 2.0**-100, "huge": 2.0**110}.get(self.weight, 1.0)
        return real if self.weight == "real" else quarters * factor


def _metric_of(assign: Tensor, slots: int) -> Tensor:
    """A metric by which ``assign`` is the only nearest: the tokens of a slot point one way."""
    return torch.nn.functional.one_hot(assign.clamp(min=0), slots).double()
