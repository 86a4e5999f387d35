"""random_mask in Triton: one kernel draws and selects, one moves the kept units, one scatters gradients.

Alphabet: ``i_`` ids, ``o_`` offsets, ``m_`` masks, ``p_`` pointers, ``b_`` blocks. Offsets into tensors are int64
before the first multiply. 32-bit words are carried in 64 bits, so that no product overflows; the compiler narrows the
multiplications again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify_kernels.random_mask import reference

__all__ = ["TARGETS", "random_mask", "random_mask_backward"]

LARGEST = 4096  # units that one program selects from; beyond, the reference's sort does
BLOCK_VALUES = 2048  # values that one program moves


@triton.jit
def _unit_keys(b_unit, row, seed):
    """Word 0 of Philox4x32-10 for counters (unit, row, 0, 0), as uint64 [BLOCK]."""
    zero = b_unit.to(tl.uint64) * 0
    c0, c1, c2, c3 = b_unit.to(tl.uint64), zero + row.to(tl.uint64), zero, zero
    key = zero + seed.to(tl.uint64)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in tl.static_range(10):
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        c0, c2 = (p1 >> 32) ^ c1 ^ k0, (p0 >> 32) ^ c3 ^ k1
        c1, c3 = p1 & 0xFFFFFFFF, p0 & 0xFFFFFFFF
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0


@triton.jit
def _select(p_seed, p_index, units, kept, seed_stride, SHARED: tl.constexpr, LOG_BLOCK: tl.constexpr):
    """The ``kept`` units of sample i_b with the smallest keys, ascending. With the unit as lower bits, no two are
    equal."""
    BLOCK: tl.constexpr = 1 << LOG_BLOCK
    i_b = tl.program_id(0).to(tl.int64)
    o_unit = tl.arange(0, BLOCK)  # [BLOCK]
    m_unit = o_unit < units
    seed = tl.load(p_seed + i_b * seed_stride)
    row = i_b if SHARED else i_b * 0
    b_order = ((_unit_keys(o_unit, row, seed) << LOG_BLOCK) | o_unit.to(tl.uint64)).to(tl.int64)  # [BLOCK]
    b_order = tl.where(m_unit, b_order, 0x7FFFFFFFFFFFFFFF)
    # The largest kept key, bit by bit: the greatest bound with fewer than `kept` keys below it.
    bound = i_b * 0
    for step in range(32 + LOG_BLOCK):
        raised = bound | (tl.full((), 1, tl.int64) << (31 + LOG_BLOCK - step))
        below = tl.sum((b_order < raised).to(tl.int32), 0)
        bound = tl.where(below < kept, raised, bound)
    m_kept = b_order <= bound
    o_slot = tl.cumsum(m_kept.to(tl.int32), 0) - 1
    tl.store(p_index + i_b * kept + o_slot, o_unit.to(tl.int64), mask=m_kept)


@triton.jit
def _first(b_key, b_other, TIE: tl.constexpr):
    """1 where the other unit's key comes first; TIE: whether it does at equal keys, being the lower unit."""
    return ((b_other <= b_key) if TIE else (b_other < b_key)).to(tl.int32)


@triton.jit
def _select_in_blocks(
    p_seed, p_index, height, width, per_block, seed_stride, SHARED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """The ``per_block`` units with the smallest keys of each 2x2 block of a height x width grid, ascending."""
    i_b = tl.program_id(0).to(tl.int64)
    o_row, o_col = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]  # of blocks
    m_block = (o_row < height // 2) & (o_col < width // 2)  # [ROWS, COLS]
    o_unit = 2 * o_row * width + 2 * o_col  # the upper left of each block
    seed = tl.load(p_seed + i_b * seed_stride)
    row = i_b if SHARED else i_b * 0
    k00, k01 = _unit_keys(o_unit, row, seed), _unit_keys(o_unit + 1, row, seed)
    k10, k11 = _unit_keys(o_unit + width, row, seed), _unit_keys(o_unit + width + 1, row, seed)
    m00 = _first(k00, k01, False) + _first(k00, k10, False) + _first(k00, k11, False) < per_block
    m01 = _first(k01, k00, True) + _first(k01, k10, False) + _first(k01, k11, False) < per_block
    m10 = _first(k10, k00, True) + _first(k10, k01, True) + _first(k10, k11, False) < per_block
    m11 = _first(k11, k00, True) + _first(k11, k01, True) + _first(k11, k10, True) < per_block
    m00, m01, m10, m11 = m00 & m_block, m01 & m_block, m10 & m_block, m11 & m_block
    # A row of blocks keeps `total` units: those of its upper line come first, then those of its lower line.
    b_upper = m00.to(tl.int32) + m01.to(tl.int32)
    b_lower = m10.to(tl.int32) + m11.to(tl.int32)
    total = per_block * (width // 2)
    o_upper = o_row * total + tl.cumsum(b_upper, 1) - b_upper
    o_lower = o_row * total + tl.sum(b_upper, 1)[:, None] + tl.cumsum(b_lower, 1) - b_lower
    p_sample = p_index + i_b * (total * (height // 2))
    b_unit = o_unit.to(tl.int64)
    tl.store(p_sample + o_upper, b_unit, mask=m00)
    tl.store(p_sample + o_upper + m00.to(tl.int32), b_unit + 1, mask=m01)
    tl.store(p_sample + o_lower, b_unit + width, mask=m10)
    tl.store(p_sample + o_lower + m10.to(tl.int32), b_unit + width + 1, mask=m11)


@triton.jit
def _gather(p_x, p_index, p_tokens, kept, values, stride_b, stride_u, stride_p, BLOCK: tl.constexpr):
    """tokens[b, j] = x[b, index[b, j]]; program (b * kept + j, block of values)."""
    i_row = tl.program_id(0).to(tl.int64)
    o_value = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_value = o_value < values
    unit = tl.load(p_index + i_row)
    b_x = tl.load(p_x + (i_row // kept) * stride_b + unit * stride_u + o_value * stride_p, mask=m_value)
    tl.store(p_tokens + i_row * values + o_value, b_x, mask=m_value)


@triton.jit
def _scatter(
    p_grad, p_index, p_out, units, kept, values, stride_b, stride_k, stride_p, STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    """out[b, u] = grad[b, j] where index[b, j] = u, else 0; program (b * units + u, block of values)."""
    i_row = tl.program_id(0).to(tl.int64)
    i_b, i_u = i_row // units, i_row % units
    o_value = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    low = i_row * 0  # binary search: the first slot in [0, kept] whose unit is not below i_u
    high = low + kept
    for _ in range(STEPS):
        middle = (low + high) // 2
        unit = tl.load(p_index + i_b * kept + middle, mask=low < high, other=0)
        below = (low < high) & (unit < i_u)
        low, high = tl.where(below, middle + 1, low), tl.where(below, high, tl.where(low < high, middle, high))
    found = (low < kept) & (tl.load(p_index + i_b * kept + low, mask=low < kept, other=-1) == i_u)
    m_value = o_value < values
    p_row = p_grad + i_b * stride_b + low * stride_k
    b_grad = tl.load(p_row + o_value * stride_p, mask=m_value & found, other=0)
    tl.store(p_out + i_row * values + o_value, b_grad, mask=m_value)


def random_mask(x: Tensor, seed: Tensor, kept: int, grid_width: int) -> tuple[Tensor, Tensor]:
    """The op on CUDA tensors (CPU tensors under the interpreter); arguments as ``reference.random_mask``."""
    reference.check_seed(seed)
    samples, units, values = x.shape
    index = _draw(seed, samples, units, kept, grid_width)
    tokens = x.new_empty((samples, kept, values))
    if tokens.numel():
        source, target = as_integers(x), as_integers(tokens)
        values, block = source.shape[2], _block(source.shape[2])
        grid = (samples * kept, triton.cdiv(values, block))
        _gather[grid](source, index, target, kept, values, *source.stride(), BLOCK=block)
    return tokens, index


def _draw(seed: Tensor, samples: int, units: int, kept: int, grid_width: int) -> Tensor:
    """The units that stay, int64 [samples, kept]."""
    log_block = max(4, (units - 1).bit_length())
    height, width = (units // grid_width, grid_width) if grid_width else (0, 0)
    rows, cols = triton.next_power_of_2(max(1, height // 2)), triton.next_power_of_2(max(1, width // 2))
    if (4 * rows * cols if grid_width else 1 << log_block) > LARGEST:
        return reference.select_units(reference.unit_keys(seed, samples, units), kept, grid_width)
    index = seed.new_empty((samples, kept))
    if not samples:
        return index
    shared = seed.dim() == 0
    stride = 0 if shared else seed.stride(0)
    if grid_width:
        _select_in_blocks[(samples,)](
            seed, index, height, width, 4 * kept // units, stride, SHARED=shared, ROWS=rows, COLS=cols
        )
    else:
        warps = 4 if log_block <= 10 else 8
        _select[(samples,)](seed, index, units, kept, stride, SHARED=shared, LOG_BLOCK=log_block, num_warps=warps)
    return index


def random_mask_backward(grad: Tensor, index: Tensor, units: int) -> Tensor:
    """The backward on CUDA tensors (CPU tensors under the interpreter); arguments as in the reference."""
    samples, kept, values = grad.shape
    out = grad.new_empty((samples, units, values))
    if out.numel():
        source, target, index = as_integers(grad), as_integers(out), index.contiguous()
        values, block = source.shape[2], _block(source.shape[2])
        grid = (samples * units, triton.cdiv(values, block))
        steps = kept.bit_length()
        _scatter[grid](source, index, target, units, kept, values, *source.stride(), STEPS=steps, BLOCK=block)
    return out


def _block(values: int) -> int:
    return min(BLOCK_VALUES, max(16, triton.next_power_of_2(values)))


def as_integers(x: Tensor) -> Tensor:
    """The same bytes as integers: the kernels move bits, whatever they mean."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if x.dtype.itemsize in sizes:
        return x.view(sizes[x.dtype.itemsize])
    return x.contiguous().view(torch.int64)  # complex128: twice as many values


# How the tests compile every kernel: types of the run-time arguments, compile-time arguments, warps.
TARGETS: list[tuple[Any, str, dict[str, Any], int]] = [
    (_select, "*i64 *i64 i32 i32 i32", {"SHARED": True, "LOG_BLOCK": 6}, 4),
    (_select, "*i64 *i64 i32 i32 i32", {"SHARED": False, "LOG_BLOCK": 10}, 4),
    (_select, "*i64 *i64 i32 i32 i32", {"SHARED": True, "LOG_BLOCK": 12}, 8),
    (_select_in_blocks, "*i64 *i64 i32 i32 i32 i32", {"SHARED": True, "ROWS": 4, "COLS": 4}, 4),
    (_select_in_blocks, "*i64 *i64 i32 i32 i32 i32", {"SHARED": False, "ROWS": 32, "COLS": 32}, 4),
    *(
        (_gather, f"*{t} *i64 *{t} i32 i32 i64 i32 i32", {"BLOCK": BLOCK_VALUES}, 4)
        for t in ("u8", "i16", "i32", "i64")
    ),
    *(
        (_scatter, f"*{t} *i64 *{t} i32 i32 i32 i64 i32 i32", {"STEPS": 6, "BLOCK": BLOCK_VALUES}, 4)
        for t in ("u8", "i16", "i32", "i64")
    ),
]
