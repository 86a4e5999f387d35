"""What the cases of all ops share: the kernels under test, inputs that are hard on them, and what counts as equal."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparsify_kernels import _registry
from sparsify_kernels.testing.asserts import assert_accurate, assert_same
from sparsify_kernels.testing.inputs import LAYOUTS
from sparsify_kernels.testing.memory import poisoned_memory

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

VALID = ("none", "all", "most", "few", "one empty sample", "nothing")

batches = st.integers(0, 4)
# Small numbers, and the sizes around vectors, blocks, chunks and tiles.
lengths = st.one_of(st.integers(0, 20), st.integers(0, 140), st.sampled_from([15, 16, 17, 31, 32, 33, 47, 48, 49, 63]))
widths = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 100, 128, 129]))
floats = st.sampled_from(sorted(FLOATS))
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 2**31 - 1)
flags = st.booleans()


class Kernels:
    """The kernels of one backend: called by name with CPU tensors, on memory full of NaN."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"

    def __call__(self, kernel: str, *args: Any) -> Any:
        moved = (a.to(self.device) if isinstance(a, Tensor) else a for a in args)
        with poisoned_memory():
            result = _registry.implementations(kernel)[self.backend](*moved)
        return result.cpu() if isinstance(result, Tensor) else tuple(t.cpu() for t in result)


def reference(kernel: str, *args: Any) -> Any:
    """What the definition gives."""
    return _registry.implementations(kernel)["reference"](*args)


def draw(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def wide(values: Any) -> list[Any]:
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


def draw_valid(kind: str, shape: tuple[int, int], g: torch.Generator) -> Tensor | None:
    if kind == "none":
        return None
    share = {"all": 1.0, "most": 0.8, "few": 0.1, "one empty sample": 0.6, "nothing": 0.0}[kind]
    valid = torch.rand(shape, generator=g) < share
    if kind == "one empty sample":
        valid[:1] = False
    return valid


def poison(x: Tensor, valid: Tensor | None, g: torch.Generator) -> Tensor:
    """``x`` [B, N, ...] with NaN, infinities and huge numbers where it is invalid."""
    if valid is None:
        return x
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.finfo(x.dtype).max], dtype=x.dtype)
    junk = bad[torch.randint(0, len(bad), x.shape, generator=g)]
    return torch.where(valid.view(*valid.shape, *[1] * (x.dim() - 2)), x, junk)


class Sums(NamedTuple):
    """A result that may err: ours, the reference's at the dtype of the inputs, and the reference's in fp64.

    ``terms``, for sums that cancel: what each adds up, taken positive. One rounding step in fp32 of that is allowed.
    ``others``: the reference's again, from numbers added up in other orders.
    """

    what: str
    ours: Tensor
    plain: Tensor
    truth: Tensor
    terms: Tensor | None = None
    others: tuple[Tensor, ...] = ()


_SEEDS, _ORDERS = 33, 8


def check(case: Any, kernels: Kernels) -> None:
    """Raise ``AssertionError`` unless the kernels give what the reference gives.

    A largest error is as random as the numbers: of a few small sums, PyTorch's may happen to be next to nothing, and so
    it may where two large logits are nearly equal and ours is off. So sums that err too much are drawn anew, often
    enough for a single number too, the reference adds them up in several orders, and all are judged together by the
    same rule.
    """
    try:
        for sums in case.sums(kernels):
            _judge(sums)
    except AssertionError:
        again = [dataclasses.replace(case, seed=case.seed + n).sums(kernels, _ORDERS) for n in range(_SEEDS)]
        for several in zip(*again, strict=True):
            _judge(_together(several))


def _together(several: tuple[Sums, ...]) -> Sums:
    """Results of one name from several seeds as one."""
    names, ours, plain, truth, terms, others = zip(*several, strict=True)
    joined = tuple(_flat(ts) for ts in zip(*others, strict=True))
    return Sums(names[0], _flat(ours), _flat(plain), _flat(truth), None if terms[0] is None else _flat(terms), joined)


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def orders(count: int, *sizes: int, seed: int) -> list[list[Tensor]]:
    """``count`` orders of axes of these sizes."""
    g = torch.Generator().manual_seed(seed)
    return [[torch.randperm(size, generator=g) for size in sizes] for _ in range(count)]


def put(x: Any, axis: int, order: Tensor) -> Any:
    """``x`` with an axis in another order; nothing, and a gradient [0] that nobody wanted, are as they were."""
    return x if x is None or x.dim() == 1 else x.index_select(axis, order)


def _judge(sums: Sums) -> None:
    """NaN and infinities where the reference has them, and its accuracy elsewhere."""
    what, ours, plain, truth, terms, others = sums
    finite = plain.isfinite() & truth.isfinite()
    assert_same(ours.masked_fill(finite, 0), plain.masked_fill(finite, 0), what)
    ours, plain, truth, *more = (t.masked_fill(~finite, 0) for t in (ours, plain, truth, *others))
    if ours.dtype == torch.float64:  # there is no finer truth
        torch.testing.assert_close(ours, plain, msg=lambda text: f"{what}: {text}")
    else:
        step = 0.0 if terms is None or terms.numel() == 0 else torch.finfo(torch.float32).eps * float(terms.max())
        if not bool(((ours.double() - truth).abs() <= step).all()):
            worst = max((plain, *more), key=lambda near: float((near.double() - truth).abs().max()))
            assert_accurate(ours, eager=worst, truth=truth, what=what)
