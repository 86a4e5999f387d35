"""attention_scores in Triton: which kernels run, on what grid, in what tiles.

Widths up to 256 (d and dv) in fp32, bf16 and fp16; anything else goes to the reference, fp64 too. Nothing of size M x
N is ever stored. Deterministic: no atomics, and every sum is in an order that follows from the shape of one sample.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sparsify_kernels.attention_scores import reference
from sparsify_kernels.attention_scores.forward_triton import attend, attend_once, over_heads, receive
from sparsify_kernels.attention_scores.tiles_triton import INTERPRETED, LOG2E

__all__ = ["TARGETS", "attention_scores", "attention_scores_backward"]

WIDEST = 256  # d and dv; beyond, the reference
ONE_PASS = 64  # queries that one program takes whole

# Products of fp32 without its last bits would not be fp32: AMD has them, NVIDIA makes them of three of tf32.
PRECISION = {"cuda": "tf32x3", "hip": "ieee"}


class Tiles(NamedTuple):
    """Queries and keys in a tile, warps, stages of the pipeline."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


# By width (64, 128, 256) and bytes of an element.
ATTEND = {
    (64, 2): Tiles(128, 64, 4, 3),
    (128, 2): Tiles(128, 64, 8, 2),
    (256, 2): Tiles(64, 32, 8, 2),
    (64, 4): Tiles(64, 32, 4, 2),
    (128, 4): Tiles(64, 32, 8, 2),
    (256, 4): Tiles(32, 16, 8, 1),
}
RECEIVE = {
    (64, 2): Tiles(64, 128, 4, 3),
    (128, 2): Tiles(64, 128, 8, 2),
    (256, 2): Tiles(32, 64, 8, 2),
    (64, 4): Tiles(32, 64, 4, 2),
    (128, 4): Tiles(32, 64, 8, 2),
    (256, 4): Tiles(16, 32, 8, 1),
}
# One tile of queries: BM is the most.
ATTEND_ONCE = {
    (64, 2): Tiles(64, 64, 4, 3),
    (128, 2): Tiles(64, 64, 4, 2),
    (256, 2): Tiles(64, 32, 8, 2),
    (64, 4): Tiles(64, 32, 4, 2),
    (128, 4): Tiles(64, 32, 8, 2),
    (256, 4): Tiles(64, 16, 8, 1),
}
OVER_HEADS = {"BH": 16, "BLOCK": 128}


def attention_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    key_bias: Tensor | None,
    query_valid: Tensor | None,
    key_valid: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op on CUDA tensors (CPU tensors under the interpreter); arguments as ``reference.attention_scores``."""
    if not _served(q, v):
        return reference.attention_scores(q, k, v, key_bias, query_valid, key_valid, scale)
    batch, heads, queries, dim = q.shape
    keys, value_dim = k.shape[2], 0 if v is None else v.shape[3]
    received = q.new_empty((batch, keys), dtype=torch.float32)
    output = q.new_empty((batch, heads, queries, value_dim))
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    part = q.new_empty((batch, heads, keys), dtype=torch.float32)
    if not batch:
        return received, output, lse
    values = v if value_dim else None
    factor = (dim**-0.5 if scale is None else scale) * LOG2E.value
    tables = (key_bias, query_valid, key_valid)
    sizes = (heads, queries, keys, dim, value_dim, factor)
    strides = (*_strides(q, 4), *_strides(k, 4), *_strides(values, 4), *(s for t in tables for s in _strides(t, 2)))
    width = _width(dim, value_dim)
    widths = {"BD": _block(dim), "BDV": _block(value_dim), "EVEN_D": _block(dim) == dim}
    widths |= {"EVEN_DV": _block(value_dim) == value_dim, "PRECISION": _precision()}
    if queries <= ONE_PASS:
        tiles = _tiles(ATTEND_ONCE, width, q)
        tiles["BM"] = min(ONE_PASS, _block(queries))
        tiles |= {"ONE_TILE": keys <= tiles["BN"], "EVEN_N": keys % tiles["BN"] == 0}
        attend_once[(batch * heads,)](q, k, values, *tables, output, lse, part, *sizes, *strides, **tiles, **widths)
    else:
        tiles = _tiles(ATTEND, width, q)
        tiles["EVEN_N"] = keys % tiles["BN"] == 0
        grid = (batch * heads * triton.cdiv(queries, tiles["BM"]),)
        attend[grid](q, k, values, *tables, output, lse, *sizes, *strides, **tiles, **widths)
    if not keys:
        return received, output, lse
    if queries > ONE_PASS:
        tiles = _tiles(RECEIVE, _width(dim, 0), q)
        tiles["EVEN_M"] = queries % tiles["BM"] == 0
        grid = (batch * heads * triton.cdiv(keys, tiles["BN"]),)
        narrow = {n: widths[n] for n in ("BD", "EVEN_D", "PRECISION")}
        receive[grid](
            q, k, *tables, lse, part, heads, queries, keys, dim, factor,
            *strides[:8], *_strides(key_bias, 2), *_strides(key_valid, 2), **tiles, **narrow,
        )  # fmt: skip
    grid = (batch * triton.cdiv(keys, OVER_HEADS["BLOCK"]),)
    over_heads[grid](
        part, query_valid, received, heads, queries, keys, *_strides(query_valid, 2), MEAN=True, **OVER_HEADS
    )
    return received, output, lse


def attention_scores_backward(*args: Any) -> Any:
    return reference.attention_scores_backward(*args)


def _served(q: Tensor, v: Tensor | None) -> bool:
    """Whether there are kernels for this dtype and these widths."""
    return q.dtype != torch.float64 and q.shape[3] <= WIDEST and (v is None or v.shape[3] <= WIDEST)


def _strides(x: Tensor | None, axes: int) -> tuple[int, ...]:
    return (0,) * axes if x is None else x.stride()


def _block(size: int) -> int:
    """What ``size`` is filled up to: matrix units take no less than 16."""
    return max(16, triton.next_power_of_2(size))


def _width(dim: int, value_dim: int) -> int:
    """The row of a table of tiles that the widths belong to."""
    return max(64, _block(dim), _block(value_dim))


def _tiles(table: dict[tuple[int, int], Tiles], width: int, q: Tensor) -> dict[str, Any]:
    tiles = table[width, q.element_size()]
    if INTERPRETED:  # small ones, so that small tests see several
        tiles = tiles._replace(BM=min(tiles.BM, 32), BN=16)
    return tiles._asdict()


def _precision() -> str:
    return "ieee" if INTERPRETED else PRECISION["hip" if torch.version.hip else "cuda"]


TARGETS: list[tuple[Any, str, dict[str, Any], int]] = []
