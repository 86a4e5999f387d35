"""Cases for random_mask: the same index, and the same bytes of any dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from sparsify_kernels.testing.asserts import assert_same
from sparsify_kernels.testing.bits import assert_same_bits, payload, placed
from sparsify_kernels.testing.fuzz.parts import (
    FLOATS,
    Kernels,
    Sums,
    batches,
    flags,
    layouts,
    reference,
    seeds,
)
from sparsify_kernels.testing.inputs import relayout

# By bytes, since a payload is moved and not computed with.
PAYLOADS = {
    "uint8": torch.uint8,
    "bool": torch.bool,
    "int16": torch.int16,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}
PAYLOADS |= FLOATS


@dataclasses.dataclass(frozen=True)
class Case:
    """Plain values; the tensors follow from them."""

    batch: int
    units: int
    values: int
    kept: int
    grid: tuple[int, int] | None
    quarters: int
    dtype: str
    layout: str
    own_seeds: bool
    seed: int

    @staticmethod
    def strategy() -> st.SearchStrategy[Case]:
        grid = st.one_of(st.none(), st.tuples(st.integers(1, 8), st.integers(1, 8)))
        return st.builds(
            Case, batches, st.one_of(st.integers(1, 150), st.just(64)), st.integers(0, 70),
            st.integers(1, 150), grid, st.integers(1, 3), st.sampled_from(sorted(PAYLOADS)), layouts, flags, seeds,
        )  # fmt: skip

    def sums(self, kernels: Kernels, others: int = 0) -> Iterator[Sums]:
        """None: nothing may err."""
        g, dtype = torch.Generator().manual_seed(self.seed), PAYLOADS[self.dtype]
        units, width, kept = self.units, 0, min(self.kept, self.units)
        if self.grid is not None:
            units, width = 4 * self.grid[0] * self.grid[1], 2 * self.grid[1]
            kept = units * self.quarters // 4
        x = payload((self.batch, units, self.values), dtype, g)
        grad = payload((self.batch, kept, self.values), dtype, g)
        key = torch.randint(0, 2**63 - 1, (self.batch,) if self.own_seeds else (), generator=g)
        tokens, index = reference("random_mask", x, key, kept, width)
        ours = kernels("random_mask", placed(x, self.layout), relayout(key, self.layout), kept, width)
        back = kernels("random_mask_backward", placed(grad, self.layout), relayout(index, self.layout), units)
        assert_same(ours[1], index, "index")
        assert_same_bits(ours[0], tokens, "tokens")
        integers = grad.view(torch.uint8).view(*grad.shape, dtype.itemsize).flatten(2) if grad.numel() else grad
        expected = reference("random_mask_backward", integers, index, units)
        assert_same_bits(back, expected.view(dtype) if grad.numel() else back, "gradient")
        return iter(())
