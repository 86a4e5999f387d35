"""Cases for attention_scores: PyTorch's accuracy, forward and backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparsify_kernels.testing.fuzz.parts import (
    FLOATS,
    VALID,
    Kernels,
    Sums,
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
from sparsify_kernels.testing.inputs import relayout


@dataclasses.dataclass(frozen=True)
class Case:
    """Plain values; the tensors follow from them."""

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    value_dim: int
    dtype: str
    kind: str
    bias: str
    query_valid: str
    key_valid: str
    scale: float | None
    layout: str
    other_layout: str
    wanted: tuple[bool, bool, bool, bool]
    grads: tuple[bool, bool]
    seed: int

    @staticmethod
    def strategy() -> st.SearchStrategy[Case]:
        scale = st.one_of(st.none(), st.sampled_from([0.0, 1.0, -0.5]), st.floats(-2, 2))
        return st.builds(
            Case, st.integers(0, 3), st.integers(1, 3), lengths, lengths, widths,
            st.one_of(st.just(0), widths), floats, st.sampled_from(["normal", "equal", "large", "zeros"]),
            st.sampled_from(["none", "normal", "some unseen", "large", "huge"]), st.sampled_from(VALID),
            st.sampled_from(VALID), scale, layouts, layouts, st.tuples(flags, flags, flags, flags),
            st.tuples(flags, flags), seeds,
        )  # fmt: skip

    def sums(self, kernels: Kernels, others: int = 0) -> Iterator[Sums]:
        """Results, then gradients; the reference's in as many other orders of channels and keys, too."""
        g, dtype = torch.Generator().manual_seed(self.seed), FLOATS[self.dtype]
        accumulation = torch.float64 if dtype == torch.float64 else torch.float32
        q = draw((self.batch, self.heads, self.queries, self.dim), g, dtype)
        k = draw((self.batch, self.heads, self.keys, self.dim), g, dtype)
        v = draw((self.batch, self.heads, self.keys, self.value_dim), g, dtype) if self.value_dim else None
        if self.kind == "equal":
            k = k[:, :, :1].expand_as(k) if self.keys else k
        q = q * {"large": 4.0, "zeros": -0.0}.get(self.kind, 1.0)
        bias = None if self.bias == "none" else draw((self.batch, self.keys), g, accumulation)
        if bias is not None and self.bias == "some unseen":
            bias[torch.rand(bias.shape, generator=g) < 0.4] = -torch.inf
        elif bias is not None:
            bias = bias * {"large": 8.0, "huge": 50.0}.get(self.bias, 1.0)
        queries = draw_valid(self.query_valid, (self.batch, self.queries), g)
        there = draw_valid(self.key_valid, (self.batch, self.keys), g)
        q = poison(q.transpose(1, 2), queries, g).transpose(1, 2)
        k = poison(k.transpose(1, 2), there, g).transpose(1, 2)
        v = None if v is None else poison(v.transpose(1, 2), there, g).transpose(1, 2)
        bias = None if bias is None else poison(bias, there, g)
        args: list[Any] = [q, k, v, bias, queries, there]
        names = (self.layout, self.other_layout, self.layout, self.layout, self.other_layout, self.layout)
        ours_args = [None if a is None else relayout(a, n) for a, n in zip(args, names, strict=True)]
        scale = None if self.scale is None else self.scale * self.dim**-0.5
        ours = kernels("attention_scores", *ours_args, scale)
        listed = [None, *orders(others, self.dim, self.keys, seed=self.seed)]
        near = [_forward(args, scale, order) for order in listed]
        plain = near[0]
        truth = reference("attention_scores", *wide(args), scale)
        for name, o, t, p, *more in zip(("received", "output", "lse"), ours, truth, *near, strict=True):
            yield Sums(name, o, p, t, others=tuple(more))

        if self.bias == "huge":  # probabilities come from exp(logit - lse), and lse is as coarse as it is large
            return
        slopes = [draw(t.shape, g, t.dtype) if on else None for t, on in zip(plain, self.grads, strict=False)]
        slopes[1] = None if v is None else slopes[1]
        wanted = list(self.wanted)
        wanted[2], wanted[3] = wanted[2] and v is not None, wanted[3] and bias is not None
        ours_slopes = [None if s is None else relayout(s, self.other_layout) for s in slopes]
        back = kernels("attention_scores_backward", *ours_slopes, *ours_args, *ours[1:], scale, wanted)
        near = [_backward(slopes, args, p, scale, wanted, order) for p, order in zip(near, listed, strict=True)]
        exact = reference("attention_scores_backward", *wide(slopes), *wide(args), *truth[1:], scale, wanted)
        # Equal keys: dq is 0, and so may PyTorch's error be, in every draw. What it adds up is not.
        terms = _terms_of_dq(wide(slopes), wide(args), truth[2], scale) if self.kind == "equal" else None
        for name, o, t, p, *more in zip(("dq", "dk", "dv", "dkey_bias"), back, exact, *near, strict=True):
            yield Sums(name, o, p, t, terms if name == "dq" and wanted[0] else None, tuple(more))


def _forward(args: list[Any], scale: float | None, order: list[Tensor] | None) -> tuple[Tensor, ...]:
    """What the reference gives with channels and keys in this order, each key's where it was."""
    if order is None:
        return reference("attention_scores", *args, scale)
    received, output, lse = reference("attention_scores", *_in_order(args, *order), scale)
    return put(received, 1, order[1].argsort()), output, lse


def _backward(
    slopes: list[Any],
    args: list[Any],
    plain: tuple[Tensor, ...],
    scale: float | None,
    wanted: list[bool],
    order: list[Tensor] | None,
) -> tuple[Tensor, ...]:
    """The same for the gradients, each where it was."""
    if order is None:
        return reference("attention_scores_backward", *slopes, *args, *plain[1:], scale, wanted)
    placed = [put(slopes[0], 1, order[1]), slopes[1], *_in_order(args, *order)]
    dq, dk, dv, dbias = reference("attention_scores_backward", *placed, *plain[1:], scale, wanted)
    channels, keys = (o.argsort() for o in order)
    return put(dq, 3, channels), put(put(dk, 2, keys), 3, channels), put(dv, 2, keys), put(dbias, 1, keys)


def _in_order(args: list[Any], channels: Tensor, keys: Tensor) -> list[Any]:
    q, k, v, bias, asked, there = args
    return [
        put(q, 3, channels), put(put(k, 2, keys), 3, channels), put(v, 2, keys), put(bias, 1, keys), asked,
        put(there, 1, keys),
    ]  # fmt: skip


def _terms_of_dq(slopes: list[Tensor | None], args: list[Any], lse: Tensor, scale: float | None) -> Tensor:
    """Of each number of dq, in fp64: the sum of what it adds up, each taken positive."""
    q, k, v, bias, asked, there = args
    if there is not None:
        k = k.masked_fill(~there[:, None, :, None], 0)
        v = None if v is None else v.masked_fill(~there[:, None, :, None], 0)
        bias = torch.zeros(there.shape, dtype=lse.dtype) if bias is None else bias
        bias = bias.masked_fill(~there, -torch.inf)
    grad = torch.zeros(*q.shape[:3], k.shape[2], dtype=lse.dtype)
    if slopes[0] is not None:
        askers = q.shape[1] * (torch.tensor(q.shape[2]) if asked is None else asked.sum(1)).clamp(min=1)
        grad = grad + (slopes[0] / askers.view(-1, 1))[:, None, None]
    if slopes[1] is not None:
        grad = grad + slopes[1] @ v.mT
    scale = q.shape[3] ** -0.5 if scale is None else scale
    logits = scale * q @ k.mT + (0 if bias is None else bias[:, None, None])
    weights = (logits - lse.unsqueeze(-1)).exp()
    mean = (weights * grad).sum(-1, keepdim=True)
    return (abs(scale) * (weights * (grad.abs() + mean.abs())) @ k.abs()).nan_to_num()  # NaN: queries that ask nothing
