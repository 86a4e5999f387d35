"""random_mask: the public function, its schemas, fakes and gradient."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsify_kernels import _registry
from sparsify_kernels._checks import Arguments, call, describe
from sparsify_kernels.random_mask import reference

__all__ = ["RandomMask", "random_mask"]


class RandomMask(NamedTuple):
    """Result of ``random_mask``."""

    tokens: Tensor
    """[B, K, P]: the kept units, in the dtype of the input."""
    index: Tensor  # type: ignore[assignment]  # tuple.index is never wanted here
    """int64 [B, K]: which units they are, strictly ascending."""


def random_mask(
    x: Tensor,
    keep: float = 0.5,
    *,
    seed: int | Tensor,
    grid: tuple[int, int] | None = None,
    stratified: bool = False,
) -> RandomMask:
    """Keep ``K = max(1, floor(keep * U + 0.5))`` random units of each sample and read no other.

        key(b, u) = word 0 of Philox4x32-10(counter = (u, r, 0, 0), key = (low, high 32 bits of the seed))

    The K smallest keys of a sample stay, ties to the lower u. The masks of a seed are the same on every backend and
    never change.

    Args:
        x: [B, U, P], units of P values of any dtype, with any strides; B may be 0.
        keep: share of the units to keep, in (0, 1].
        seed: in [0, 2^63). An int or an int64 tensor []: r = b, so that the samples of a batch differ. An int64
            tensor [B]: r = 0, so that a sample has the same mask in any batch.
        grid: (rows, columns) of the units, row-major: rows * columns = U. Needed by ``stratified``, both even then.
        stratified: each 2x2 block of the grid keeps its ``4 * keep`` smallest keys; keep must be 1/4, 1/2 or 3/4.

    Returns:
        ``RandomMask(tokens [B, K, P], index int64 [B, K])``. The gradient of ``tokens`` is scattered into zeros.

    Raises:
        TypeError: an argument of another type or dtype. ValueError: another rank, size or device, or a value out of
            range (inside ``torch.compile`` a negative seed tensor is a ``RuntimeError``; on a GPU it is looked at
            only with ``SPARSIFY_CHECK=1``, and draws some mask otherwise).

    Deterministic; uses no global random state. Masking after Diao et al., ACL 2025 (arXiv 2506.01319), section 3.2.

    >>> import torch
    >>> from sparsify_kernels import random_mask
    >>> random_mask(torch.arange(8).view(1, 8, 1), keep=0.5, seed=0).index
    tensor([[0, 2, 5, 7]])
    """
    args = Arguments("random_mask")
    args.tensor("x", x, "B U P")
    units = args.sizes["U"]
    args.require(units > 0, "x", "[B, U, P] with U >= 1", x)
    if isinstance(keep, (bool, Tensor)) or not isinstance(keep, (int, float, torch.SymFloat)):
        raise TypeError(f"random_mask: keep must be a float, got {describe(keep)}")
    args.require(0 < keep <= 1, "keep", "in (0, 1]", keep)
    kept = max(1, math.floor(keep * units + 0.5))
    grid_width = _grid_width(args, keep, grid, stratified)
    tokens, index = call(_OP, x, _seed_tensor(args, seed, x), kept, grid_width)
    return RandomMask(tokens, index)


def _grid_width(args: Arguments, keep: float, grid: tuple[int, int] | None, stratified: bool) -> int:
    """Columns of the grid of a stratified mask, 0 for any other."""
    if grid is not None:
        pair = isinstance(grid, (tuple, list)) and len(grid) == 2
        if not pair or any(isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) for n in grid):
            raise TypeError(f"random_mask: grid must be (rows, columns), got {describe(grid)}")
        rows, cols = grid
        fits = rows > 0 and cols > 0 and rows * cols == args.sizes["U"]
        args.require(fits, "grid", "(rows, columns) with rows * columns = U", grid)
    if not stratified:
        return 0
    if grid is None:
        raise ValueError("random_mask: grid must be given for a stratified mask, got None")
    args.require(rows % 2 == 0 and cols % 2 == 0, "grid", "even in both directions for a stratified mask", grid)
    args.require(keep in (0.25, 0.5, 0.75), "keep", "1/4, 1/2 or 3/4 for a stratified mask", keep)
    return cols


def _seed_tensor(args: Arguments, seed: int | Tensor, x: Tensor) -> Tensor:
    """The seed as an int64 tensor on the device of ``x``."""
    if isinstance(seed, Tensor):
        args.require(seed.dim() <= 1, "seed", "int64 [] or [B]", seed)
        args.tensor("seed", seed, "B" if seed.dim() == 1 else "", (torch.int64,))
        return seed
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"random_mask: seed must be an int or an int64 tensor, [] or [B], got {describe(seed)}")
    if not torch.compiler.is_compiling():  # compiled, the op itself looks: no guard on every new seed
        args.require(0 <= seed < 2**63, "seed", "in [0, 2**63)", seed)
    return torch.full((), seed, dtype=torch.int64, device=x.device)


def _fake(x: Tensor, seed: Tensor, kept: int, grid_width: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], kept, x.shape[2])), seed.new_empty((x.shape[0], kept))


def _fake_backward(grad: Tensor, index: Tensor, units: int) -> Tensor:
    return grad.new_empty((grad.shape[0], units, grad.shape[2]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.units = inputs[0].shape[1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad_tokens: Tensor | None, grad_index: None) -> tuple[Tensor | None, None, None, None]:
    if grad_tokens is None or not ctx.needs_input_grad[0]:
        return None, None, None, None
    return _BACKWARD(grad_tokens, ctx.saved_tensors[0], ctx.units), None, None, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
    """The backward is linear in its gradient: its own gradient gathers what it scattered."""
    (index,) = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0]
    return reference.gather_units(grad, index) if wanted else None, None, None


_OP = _registry.define(
    "random_mask",
    "(Tensor x, Tensor seed, SymInt kept, SymInt grid_width) -> (Tensor tokens, Tensor index)",
    reference=reference.random_mask,
    fake=_fake,
)
_BACKWARD = _registry.define(
    "random_mask_backward",
    "(Tensor grad, Tensor index, SymInt units) -> Tensor",
    reference=reference.random_mask_backward,
    fake=_fake_backward,
)
_registry.differentiate("random_mask", _backward, _setup)
_registry.differentiate("random_mask_backward", _double_backward, _setup_backward)
