"""window_attention in Triton: which kernels run, on what grid, in what tiles.

Heads up to 128 wide in fp32, bf16 and fp16; anything else goes to the reference, fp64 too. Windows are read where
their tokens lie: nothing is gathered first, nothing padded in memory. Two small kernels look whether the windows are a
partition; where they are not, the kernels that follow read none of them and fill what they were to write with NaN.

Deterministic: no atomics, and the order of every sum follows from the shapes and the windows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sparsify_kernels._checks import InvalidValue
from sparsify_kernels._floats_triton import INTERPRETED
from sparsify_kernels._tiles_triton import PRECISION, Tiles
from sparsify_kernels.window_attention import reference
from sparsify_kernels.window_attention.backward_triton import (
    fold_pairs,
    fold_parts,
    grad_pairs,
    grad_rows,
    grad_window,
    row_sums,
)
from sparsify_kernels.window_attention.forward_triton import attend
from sparsify_kernels.window_attention.tiles_triton import check_windows, enter_windows

__all__ = ["TARGETS", "window_attention", "window_attention_backward"]

WIDEST = 128  # d; beyond, the reference
CHECK = {"BLOCK": 64, "num_warps": 1}
ENTER = {"BLOCK": 64, "OTHERS": 16, "num_warps": 1}
TILE_NAMES = ("BM", "BN", "ONE")
PAIRS = {"PLACES": 64, "BLOCK": 16}
PARTS = 2048  # numbers that one step of ``fold_parts`` adds
# Programs of the kernels that sum over windows: enough to fill a large GPU. Slabs follow from it and the shapes alone,
# so every GPU sums in the same order.
PROGRAMS = 1024

# By kernel: by width (32: up to 32, 64, 128), bytes of an element. The largest that take no more registers than there
# are on any of the GPUs that the tests compile for.
TILES: dict[Any, dict[tuple[int, int], Tiles]] = {
    attend: {
        (32, 2): Tiles(64, 32, 8, 1),
        (64, 2): Tiles(64, 32, 4, 2),
        (128, 2): Tiles(32, 32, 8, 1),
        (32, 4): Tiles(32, 32, 8, 1),
        (64, 4): Tiles(32, 32, 8, 1),
        (128, 4): Tiles(16, 16, 8, 1),
    },
    grad_window: {
        (32, 2): Tiles(64, 64, 8, 1),
        (64, 2): Tiles(32, 32, 4, 1),
        (128, 2): Tiles(32, 32, 8, 1),
        (32, 4): Tiles(32, 32, 8, 1),
        (64, 4): Tiles(16, 16, 4, 1),
        (128, 4): Tiles(16, 16, 8, 1),
    },
    grad_rows: {
        (32, 2): Tiles(32, 32, 4, 2),
        (64, 2): Tiles(32, 32, 4, 1),
        (128, 2): Tiles(16, 16, 4, 1),
        (32, 4): Tiles(16, 16, 4, 1),
        (64, 4): Tiles(16, 16, 4, 1),
        (128, 4): Tiles(16, 16, 8, 1),
    },
    grad_pairs: {(width, size): Tiles(16, 32, 4, 1) for width in (32, 64, 128) for size in (2, 4)},
}
# The grid of ``grad_rows``. A tile of 16 x 32 is shared out among four warps, one of 16 x 16 each of them holds whole.
TILES[row_sums] = {key: tiles._replace(BN=32) for key, tiles in TILES[grad_rows].items()}


def window_attention(
    qkv: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    member: Tensor,
    start: Tensor,
    place: Tensor,
    region: Tensor | None,
    cosine: bool,
) -> tuple[Tensor, Tensor]:
    """The op on CUDA tensors (CPU tensors under the interpreter); arguments as ``reference.window_attention``."""
    if not _served(qkv):
        return reference.window_attention(qkv, bias, scale, member, start, place, region, cosine)
    call = _Call(qkv, bias, scale, member, start, place, region, cosine)
    output = qkv.new_empty((call.tokens, call.heads, call.dim))
    lse = bias.new_empty((call.tokens, call.heads))
    if call.tokens:
        tiles = call.tiles(attend)
        count = triton.cdiv(call.places, tiles["BM"])
        numbers = (call.tokens, call.heads, call.dim, count, *call.numbers, *qkv.stride())
        attend[(call.windows * call.heads * count,)](
            qkv, call.bias, call.scale, *call.members, call.bad, output, lse, *numbers, **tiles
        )
    return output, lse


def window_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    member: Tensor,
    start: Tensor,
    place: Tensor,
    region: Tensor | None,
    lse: Tensor,
    cosine: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward on CUDA tensors (CPU tensors under the interpreter); arguments as in the reference."""
    windows = (member, start, place, region)
    if not _served(qkv):
        return reference.window_attention_backward(grad, qkv, bias, scale, *windows, lse, cosine, wanted)
    call = _Call(qkv, bias, scale, *windows, cosine)
    dqkv = qkv.new_empty(qkv.shape if wanted[0] else (0,))
    dbias = bias.new_empty(bias.shape if wanted[1] else (0,))
    dscale = bias.new_empty((call.heads,) if wanted[2] else (0,))
    if not any(wanted):
        return dqkv, dbias, dscale
    asked = dqkv if wanted[0] else None
    inputs = (qkv, call.bias, call.scale, *call.members)
    strides = (*qkv.stride(), *grad.stride())
    lse = lse.contiguous()
    one = call.places <= TILES[grad_window][_width(call.dim), qkv.element_size()].BM
    launch = call.tiles(grad_window if one else grad_rows)
    tiles = 1 if one else triton.cdiv(call.places, launch["BM"])
    grid = (call.windows * call.heads * tiles,)
    dot = bias.new_empty((call.windows * tiles, call.heads)) if wanted[2] else None
    inverse = sums = pair = None
    if wanted[1] or not one:
        inverse, sums = lse.new_empty(lse.shape), lse.new_empty(lse.shape)
    rows, sizes = (grad, lse, inverse, sums), (call.heads, call.dim)
    if one:
        numbers = (call.tokens, *sizes, *call.numbers, *strides)
        grad_window[grid](*inputs, call.bad, *rows, asked, dot, *numbers, **launch)
    else:
        numbers = (*sizes, tiles, *call.numbers, *strides)
        row_sums[grid](*inputs, call.bad, *rows, *numbers, **call.tiles(row_sums))
        if wanted[0] or wanted[2]:
            grad_rows[grid](*inputs, call.bad, *rows, asked, dot, call.tokens, *numbers, **launch)
    if wanted[1]:
        launch = call.tiles(grad_pairs)
        tiles, key_tiles = (triton.cdiv(call.places, launch[n]) for n in ("BM", "BN"))
        slabs, share = call.slabs(tiles * key_tiles)
        pair = bias.new_empty((slabs, call.heads, call.places, call.places))
        grid = (slabs * call.heads * tiles * key_tiles,)
        numbers = (*sizes, tiles, key_tiles, call.windows, call.places, share, *call.numbers, *strides)
        grad_pairs[grid](*inputs, call.cell, call.bad, *rows, pair, *numbers, **launch)
    if dot is not None:
        call.fold(dot, dscale)
    if pair is not None:
        total = bias.new_empty(pair.shape[1:])
        call.fold(pair, total)
        blocks = triton.cdiv(bias.shape[1] * bias.shape[2], PAIRS["BLOCK"])
        _, center, width = call.numbers
        fold_pairs[(call.heads * blocks,)](total, dbias, blocks, center, call.places, width, **PAIRS)
    return dqkv, dbias, dscale


class _Call:
    """What the launches of one call share: sizes, checked windows, tiles."""

    def __init__(
        self,
        qkv: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        member: Tensor,
        start: Tensor,
        place: Tensor,
        region: Tensor | None,
        cosine: bool,
    ) -> None:
        self.tokens, _, self.heads, self.dim = qkv.shape
        self.windows, self.places = start.shape[0] - 1, reference._places(bias)
        self.element_size, self.cosine = qkv.element_size(), cosine
        self.bias, self.scale = bias.contiguous(), None if scale is None else scale.contiguous()
        member, start, place = member.contiguous(), start.contiguous(), place.contiguous()
        region = None if region is None else region.contiguous()
        part = None if region is None else bias.new_empty((self.tokens,))
        self.members = (member, start, place, part)
        default_scale = 1.0 if cosine else self.dim**-0.5
        self.numbers = (default_scale, bias.shape[1] * bias.shape[2] // 2, (bias.shape[2] + 1) // 2)
        self.cell = member.new_empty((self.windows, self.places))
        self.bad = member.new_empty((1,), dtype=torch.int32)
        seen = member.new_empty((self.tokens,))
        windows, sizes = (member, start, place), (self.tokens, self.windows, self.places)
        tables = (*windows, region, seen, self.cell, part, self.bad)
        enter_windows[(self.windows,)](*tables, self.tokens, self.places, **ENTER)
        check_windows[(self.windows,)](*windows, seen, self.cell, self.bad, *sizes, **CHECK)
        if reference.check_values(qkv.device) and bool(self.bad):
            raise InvalidValue(reference.complaint(bias, member, start, place))

    def tiles(self, kernel: Any) -> dict[str, Any]:
        """The launch of a kernel whose tiles are of members: no larger than a window."""
        width = _width(self.dim)
        tiles = TILES[kernel][width, self.element_size]
        block = _block(self.places)
        tiles = tiles._replace(BM=min(tiles.BM, block), BN=min(tiles.BN, block))
        precision = "ieee" if INTERPRETED else PRECISION["hip" if torch.version.hip else "cuda"]
        launch = tiles._asdict() | {"ONE": self.places <= tiles.BM}
        launch = {n: v for n, v in launch.items() if n not in TILE_NAMES or n in kernel.arg_names}
        return launch | {"BD": _block(self.dim), "COSINE": self.cosine, "PRECISION": precision}

    def slabs(self, tiles: int) -> tuple[int, int]:
        """How many slabs of windows there are, and windows a slab, for a kernel with so many programs a slab and
        head."""
        share = triton.cdiv(self.windows, min(self.windows, triton.cdiv(PROGRAMS, self.heads * tiles)))
        return triton.cdiv(self.windows, share), share

    def fold(self, parts: Tensor, out: Tensor) -> None:
        """``parts`` [parts, ...] added up, into ``out`` [...]."""
        block = min(64, triton.next_power_of_2(out.numel()))
        sizes = (parts.shape[0], out.numel())
        grid = (triton.cdiv(out.numel(), block),)
        fold_parts[grid](parts, self.bad, out, *sizes, PARTS=PARTS // block, BLOCK=block)


def _served(qkv: Tensor) -> bool:
    """Whether there are kernels for this dtype and this width."""
    return qkv.dtype != torch.float64 and qkv.shape[3] <= WIDEST


def _width(dim: int) -> int:
    """The column of ``TILES``."""
    return max(32, _block(dim))


def _block(size: int) -> int:
    """What ``size`` is filled up to: matrix units take no less than 16."""
    return max(16, triton.next_power_of_2(size))


def _target(
    kernel: Any, dtype: str, width: int, *, bare: bool = False, **changes: Any
) -> tuple[Any, str, dict[str, Any], int]:
    """How a kernel is compiled for heads ``width`` wide: ``bare`` without scale, its gradient and regions, else with
    all there is."""
    names = kernel.arg_names
    tiles = TILES[kernel][width, 2 if dtype == "bf16" else 4]
    constants = {
        **tiles._asdict(),
        "BD": width,
        "dim": width,
        "ONE": True,
        "COSINE": not bare,
        "qkv_d": 1,
        "grad_d": 1,
        **changes,
    }
    constants |= {"PRECISION": "ieee" if dtype == "bf16" else PRECISION}
    constants |= dict.fromkeys(("p_scale", "p_part", "p_dot")) if bare else {}
    warps = constants.pop("num_warps")
    constants = {n: c for n, c in constants.items() if n in names or n == "num_stages"}
    types = dict.fromkeys(("p_qkv", "p_out", "p_grad", "p_dqkv"), f"*{dtype}:16")
    types |= dict.fromkeys(("p_member", "p_start", "p_place", "p_cell"), "*i64:16")
    types |= {"p_bad": "*i32", "heads": "i32", "tiles": "i32", "default_scale": "fp32"}
    types |= dict.fromkeys(("key_tiles", "tokens", "windows", "places", "center", "width", "share"), "i32")
    rest = (types.get(n, "*fp32:16" if n.startswith("p_") else "i32:16") for n in names if n not in constants)
    return kernel, " ".join(rest), constants, warps


def _shapes(kernel: Any) -> list[tuple[str, int]]:
    """The dtypes and widths that the tests compile: of the widths of one tile the widest, which takes most registers.

    Wide heads in fp32, rare and slow to compile, are left out.
    """
    table = {key: tiles for key, tiles in TILES[kernel].items() if key != (128, 4)}
    widest = {(tiles, size): width for (width, size), tiles in table.items()}
    return [("bf16" if size == 2 else "fp32", width) for (_, size), width in widest.items()]


# How the tests compile every kernel: types of the run-time arguments (:16 for a multiple of 16), compile-time
# arguments, warps.
TARGETS: list[tuple[Any, str, dict[str, Any], int]] = [
    (enter_windows, "*i64 *i64 *i64 *i64 *i64 *i64 *fp32 *i32 i32 i32", {"BLOCK": 64, "OTHERS": 16}, 1),
    (check_windows, "*i64 *i64 *i64 *i64 *i64 *i32 i32 i32 i32", {"BLOCK": 64}, 1),
    *(_target(kernel, dtype, width, ONE=False) for kernel in TILES for dtype, width in _shapes(kernel)),
    _target(attend, "bf16", 64),
    *(_target(kernel, "bf16", 32, bare=True) for kernel in TILES),
    (fold_parts, "*fp32:16 *i32 *fp32:16 i32 i32", {"PARTS": 32, "BLOCK": 64}, 4),
    (fold_pairs, "*fp32:16 *fp32:16 i32 i32 i32 i32", PAIRS, 4),
]
