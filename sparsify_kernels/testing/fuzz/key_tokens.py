"""Cases for key_tokens and gather_tokens: the same index, or the same complaint; the same bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hypothesis import strategies as st

from sparsify_kernels.testing.asserts import assert_same
from sparsify_kernels.testing.bits import assert_same_bits, payload, placed
from sparsify_kernels.testing.fuzz.parts import (
    FLOATS,
    VALID,
    Kernels,
    Sums,
    batches,
    draw,
    draw_valid,
    floats,
    layouts,
    lengths,
    poison,
    reference,
    seeds,
)
from sparsify_kernels.testing.inputs import SCORE_KINDS, relayout, score_inputs
from sparsify_kernels.testing.shapes import KeyShape

SPECIAL = (-torch.inf, -3.4e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 3e-45, 1.0, 1.0 + 2**-23, 3.4e38, torch.inf)


@dataclasses.dataclass(frozen=True)
class Case:
    """Plain values; the tensors follow from them."""

    batch: int
    tokens: int
    kind: str
    dtype: str
    layout: str
    valid: str
    valid_layout: str
    fence: float
    capacity: int | None
    nan: bool
    inner: tuple[int, ...]
    seed: int

    @staticmethod
    def strategy() -> st.SearchStrategy[Case]:
        fence = st.one_of(st.sampled_from([0.0, 0.1, 1 / 3, 1.5, 1e-300, 1e300]), st.floats(0, 50), st.floats(0, 1e308))
        inner = st.lists(st.integers(0, 9), max_size=2).map(tuple)
        return st.builds(
            Case, batches, lengths, st.sampled_from([*SCORE_KINDS, "special"]), floats, layouts,
            st.sampled_from(VALID), layouts, fence, st.one_of(st.none(), st.integers(1, 40)),
            st.integers(0, 19).map(lambda n: n == 0), inner, seeds,
        )  # fmt: skip

    def sums(self, kernels: Kernels, others: int = 0) -> Iterator[Sums]:
        """Of the keys nothing may err; of what is gathered, the gradient."""
        g, dtype = torch.Generator().manual_seed(self.seed), FLOATS[self.dtype]
        shape = (self.batch, self.tokens)
        if self.kind == "special":
            scores = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), shape, generator=g)].to(dtype)
        else:
            scores = score_inputs(KeyShape(*shape), self.kind, dtype, seed=self.seed)["scores"]
        valid = draw_valid(self.valid, shape, g)
        scores = poison(scores, valid, g)
        if self.nan and scores.numel() and kernels.device == "cpu":  # a GPU does not look for it
            scores.view(-1)[torch.randint(0, scores.numel(), (1,), generator=g)] = torch.nan
        there = None if valid is None else relayout(valid, self.valid_layout)
        expected = _outcome(reference, "key_tokens", scores, valid, self.fence, self.capacity)
        args = relayout(scores, self.layout), there, self.fence, self.capacity
        ours = _outcome(kernels, "key_tokens", *args)
        assert_same(ours, expected, "keys")
        yield from self._gather(kernels, g)

    def _gather(self, kernels: Kernels, g: torch.Generator) -> Iterator[Sums]:
        """Rows of any dtype by any index, and the gradient of the floats among them."""
        slots, tokens = min(self.capacity or 7, 20), max(self.tokens, 1)
        index = torch.randint(-1, tokens, (self.batch, slots), generator=g)
        x = payload((self.batch, tokens, *self.inner), FLOATS[self.dtype], g)
        ours = kernels("key_tokens_gather", placed(x, self.layout), relayout(index, self.valid_layout))
        assert_same_bits(ours, reference("key_tokens_gather", x, index), "gathered")
        grad = draw((self.batch, slots, *self.inner), g, FLOATS[self.dtype])
        back = kernels("key_tokens_gather_backward", relayout(grad, self.layout), index, tokens)
        plain = reference("key_tokens_gather_backward", grad, index, tokens)
        truth = reference("key_tokens_gather_backward", grad.double(), index, tokens)
        yield Sums("gradient of what was gathered", back, plain, truth)


def _outcome(kernel: Callable[..., Any], *args: Any) -> Any:
    """The result, or the text of the error that a bad value raises."""
    try:
        return tuple(kernel(*args))
    except RuntimeError as error:
        return str(error).splitlines()[0]
