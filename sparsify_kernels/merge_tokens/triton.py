"""merge_tokens in Triton: three kernels forward, one backward; the N x K similarity never exists in memory.

``_assign`` multiplies a block of tokens by one block of keys after the other, whose metrics it gathers, and keeps the
best similarity met so far and its slot. ``rank_rows`` lists the members of each slot, ``sum_rows`` reads the rows of x
that belong to a slot and writes their mean: x is read once and in its own precision, tokens are written once. Nothing
is added atomically, and the order of every sum is that of the members: each run gives the same bits. (The other way, a
product of x with the one-hot assignment, reads all of x for each block of slots, multiplies K times as much as is
needed, rounds weights to bf16 where x is bf16, and lets a NaN in one cluster reach every other.) ``_gradients`` gathers
for each token from its slot.

fp32 metrics are multiplied in fp32, not in tf32: nearly equal similarities must not be told apart by rounding. fp64
goes to the reference.

Bad values never lead out of bounds: ``_assign`` looks at the keys and weights that it reads and notes, for each block
of tokens, whether any was bad; then tokens and size of that sample are NaN, and after a bad key its assignment is -1.

Alphabet: ``i_`` ids, ``o_`` offsets, ``m_`` masks, ``p_`` pointers, ``b_`` blocks. Offsets into tensors are int64
before the first multiply. Where a pointer may be None, the kernel is compiled without what it is for.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify_kernels._checks import InvalidValue
from sparsify_kernels._floats_triton import INTERPRETED, narrowed, widened
from sparsify_kernels._segments_triton import RANK_BLOCKS, SUM_BLOCKS, rank_programs, rank_rows, sum_rows, value_blocks
from sparsify_kernels.merge_tokens import reference

__all__ = ["TARGETS", "merge_tokens", "merge_tokens_backward"]

# Tokens, keys and values of a metric that are multiplied at a time, by the warps of one program; tokens and values that
# one step of the backward moves. What fits the registers of all targets. Smaller under the interpreter, so that small
# inputs take several blocks.
TOKENS = 16 if INTERPRETED else 64
ASSIGN_BLOCKS = {
    dtype: {"TOKENS": TOKENS, "KEYS": 16 if INTERPRETED else keys, "BLOCK": 16, "num_warps": 8}
    for dtype, keys in ((torch.float32, 16), (torch.bfloat16, 64), (torch.float16, 64))
}
GRADIENT_BLOCKS = {"TOKENS": 16, "BLOCK": 32} if INTERPRETED else {"TOKENS": 4, "BLOCK": 256}


@triton.jit
def _ordered(b_x):
    """fp32 as int32 of the same order, -0, which a matrix unit may leave, as +0."""
    b_bits = tl.where(b_x == 0.0, 0, b_x.to(tl.int32, bitcast=True))
    return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _assign(
    p_metric,
    p_index,
    p_count,
    p_weight,
    p_valid,
    p_assign,
    p_bad,
    tokens,
    slots,
    dim,
    blocks,
    stride_b,
    stride_n,
    stride_d,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """assign[b, i] = the slot of the most similar key; bad[b, block] = 1 after a bad key or weight. Program
    (b * blocks + block of tokens)."""
    i_b, i_block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0).to(tl.int64) % blocks
    o_token = i_block * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    m_alive = o_token < tokens
    if p_valid is not None:
        m_alive = m_alive & (tl.load(p_valid + i_b * tokens + o_token, mask=m_alive, other=0) != 0)
    p_sample = p_metric + i_b * stride_b
    count = tl.load(p_count + i_b)
    bad_count = (count < 0) | (count > slots) | ((count == 0) & (tl.max(m_alive.to(tl.int32), 0) > 0))
    bad_key = bad_count.to(tl.int32)
    live = tl.minimum(tl.maximum(count, 0), slots)

    b_best = tl.full([TOKENS], -0x80000000, tl.int32)  # below every similarity
    b_slot = tl.full([TOKENS], 0, tl.int32)
    for first in range(0, live, KEYS):
        o_slot = first + tl.arange(0, KEYS).to(tl.int64)  # [KEYS]
        m_slot = o_slot < live
        b_key = tl.load(p_index + i_b * slots + o_slot, mask=m_slot, other=-1)
        m_key = m_slot & (b_key >= 0) & (b_key < tokens)
        if p_valid is not None:
            m_key = m_key & (tl.load(p_valid + i_b * tokens + b_key, mask=m_key, other=0) != 0)
        bad_key = tl.maximum(bad_key, tl.max((m_slot & (m_key == 0)).to(tl.int32), 0))
        b_sum = tl.full([TOKENS, KEYS], 0.0, tl.float32)
        for start in range(0, dim, BLOCK):
            o_dim = start + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
            m_dim = o_dim < dim
            p_row = p_sample + o_token[:, None] * stride_n + o_dim[None, :] * stride_d
            b_row = tl.load(p_row, mask=m_alive[:, None] & m_dim[None, :], other=0.0)  # [TOKENS, BLOCK]
            p_named = p_sample + b_key[None, :] * stride_n + o_dim[:, None] * stride_d
            b_named = tl.load(p_named, mask=m_key[None, :] & m_dim[:, None], other=0.0)  # [BLOCK, KEYS]
            if INTERPRETED and b_row.dtype == tl.bfloat16:
                b_row, b_named = widened(b_row), widened(b_named)
            b_sum = tl.dot(b_row, b_named, b_sum, input_precision="ieee")
        b_sum = tl.where(b_sum == b_sum, b_sum, -float("inf"))  # NaN is unlike itself
        b_order = tl.where(m_slot[None, :], _ordered(b_sum), -0x80000000)  # [TOKENS, KEYS]
        b_order = tl.where(b_key[None, :] == o_token[:, None], 0x7FFFFFFF, b_order)  # its own key exceeds +inf
        b_top = tl.max(b_order, 1)  # [TOKENS]
        b_first = tl.min(tl.where(b_order == b_top[:, None], o_slot.to(tl.int32)[None, :], 0x7FFFFFFF), 1)
        b_slot = tl.where(b_top > b_best, b_first, b_slot)
        b_best = tl.maximum(b_best, b_top)
    tl.store(p_assign + i_b * tokens + o_token, tl.where(m_alive & (bad_key == 0), b_slot, -1), mask=o_token < tokens)

    bad = bad_key
    if p_weight is not None:
        b_weight = tl.load(p_weight + i_b * tokens + o_token, mask=m_alive, other=0.0)
        m_good = (b_weight >= 0.0) & (b_weight < float("inf"))
        bad = tl.maximum(bad, tl.max((m_good == 0).to(tl.int32), 0))
    tl.store(p_bad + tl.program_id(0), bad)


@triton.jit
def _gradients(
    p_grad,
    p_grad_size,
    p_x,
    p_weight,
    p_mean,
    p_size,
    p_assign,
    p_dx,
    p_dweight,
    rows,
    tokens,
    slots,
    dim,
    grad_b,
    grad_k,
    grad_d,
    x_b,
    x_n,
    x_d,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx[i] = w[i] / size[j] * grad[j], dweight[i] = (x[i] - mean[j]) . grad[j] / size[j] + grad_size[j], where j =
    assign[i] and size[j] > 0; else 0. ``rows`` = B * tokens. Program (block of rows)."""
    o_row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    m_row = o_row < rows
    o_b = o_row // tokens
    b_slot = tl.load(p_assign + o_row, mask=m_row, other=-1)
    m_live = (b_slot >= 0) & (b_slot < slots)
    o_slot = tl.where(m_live, b_slot, 0)
    b_size = tl.load(p_size + o_b * slots + o_slot, mask=m_live, other=0.0)
    m_live = m_live & (b_size > 0)  # not where it is NaN
    b_share = tl.div_rn(1.0, tl.where(m_live, b_size, 1.0))
    b_scale = b_share
    if p_weight is not None:
        b_scale = b_share * tl.load(p_weight + o_row, mask=m_live, other=0.0)
    b_dot = tl.full([TOKENS, BLOCK], 0.0, tl.float32)
    for first in range(0, dim, BLOCK):
        o_dim = first + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
        m_dim = o_dim[None, :] < dim
        m_read = m_live[:, None] & m_dim  # [TOKENS, BLOCK]
        b_grad = tl.full([TOKENS, BLOCK], 0.0, tl.float32)
        if p_grad is not None:
            p_block = p_grad + (o_b * grad_b + o_slot * grad_k)[:, None] + o_dim[None, :] * grad_d
            b_grad = widened(tl.load(p_block, mask=m_read, other=0.0))
        if p_dx is not None:
            p_block = p_dx + o_row[:, None] * dim + o_dim[None, :]
            b_dx = tl.where(m_read, b_grad * b_scale[:, None], 0.0)
            tl.store(p_block, narrowed(b_dx, p_dx.dtype.element_ty), mask=m_row[:, None] & m_dim)
        if p_x is not None:
            p_block = p_x + (o_b * x_b + o_row % tokens * x_n)[:, None] + o_dim[None, :] * x_d
            b_away = widened(tl.load(p_block, mask=m_read, other=0.0))
            p_block = p_mean + ((o_b * slots + o_slot) * dim)[:, None] + o_dim[None, :]
            b_away -= widened(tl.load(p_block, mask=m_read, other=0.0))
            b_dot += b_away * b_grad
    if p_dweight is not None:
        b_dweight = tl.sum(b_dot, 1) * b_share
        if p_grad_size is not None:
            b_dweight += tl.load(p_grad_size + o_b * slots + o_slot, mask=m_live, other=0.0)
        tl.store(p_dweight + o_row, tl.where(m_live, b_dweight, 0.0), mask=m_row)


def merge_tokens(
    x: Tensor, metric: Tensor, index: Tensor, count: Tensor, weight: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The op on CUDA tensors (CPU tensors under the interpreter); arguments as ``reference.merge_tokens``."""
    if torch.float64 in (x.dtype, metric.dtype):
        return reference.merge_tokens(x, metric, index, count, weight, valid)
    samples, tokens, dim = x.shape
    slots = index.shape[1]
    index, count = index.contiguous(), count.contiguous()
    weights = None if weight is None else weight.contiguous()
    there = None if valid is None else valid.contiguous().view(torch.uint8)
    merged = x.new_empty((samples, slots, dim))
    size = x.new_empty((samples, slots), dtype=torch.float32)
    assign = index.new_empty((samples, tokens))
    if not samples:
        return merged, size, assign
    blocks = max(1, triton.cdiv(tokens, TOKENS))  # one even without tokens, for the keys
    bad = index.new_empty((samples, blocks), dtype=torch.int32)
    sizes = (tokens, slots, metric.shape[2], blocks)
    _assign[(samples * blocks,)](
        metric, index, count, weights, there, assign, bad, *sizes, *metric.stride(), **ASSIGN_BLOCKS[metric.dtype]
    )
    if reference.check_values(x.device) and bool(bad.any()):
        raise InvalidValue(reference._complaint(index, count, weight, reference._valid(x, valid)))
    start = index.new_empty((samples, slots + 1), dtype=torch.int32)
    members = index.new_empty((samples, tokens), dtype=torch.int32)
    programs = rank_programs(tokens, slots)
    rank_rows[(samples * programs,)](assign, start, members, tokens, slots, programs, **RANK_BLOCKS)
    grid = (samples * slots, value_blocks(dim))
    sizes = (tokens, slots, dim, blocks)
    sum_rows[grid](x, weights, start, members, bad, merged, size, *sizes, *x.stride(), **SUM_BLOCKS)
    return merged, size, assign


def merge_tokens_backward(
    grad_tokens: Tensor | None,
    grad_size: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    tokens: Tensor,
    size: Tensor,
    assign: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """The backward on CUDA tensors (CPU tensors under the interpreter); arguments as in the reference."""
    if tokens.dtype == torch.float64:
        return reference.merge_tokens_backward(grad_tokens, grad_size, x, weight, tokens, size, assign, wanted)
    samples, length = assign.shape
    slots, dim = tokens.shape[1:]
    dx = tokens.new_empty((samples, length, dim) if wanted[0] else (0,))
    dweight = size.new_empty((samples, length) if wanted[1] else (0,))
    if not samples * length or not any(wanted):
        return dx, dweight
    away = x if wanted[1] else None  # without x the weights have no gradient at all, as in the reference
    if away is None:
        grad_size = None
    _gradients[(triton.cdiv(samples * length, GRADIENT_BLOCKS["TOKENS"]),)](
        grad_tokens,
        None if grad_size is None else grad_size.contiguous(),
        away,
        None if weight is None else weight.contiguous(),
        tokens.contiguous(),
        size.contiguous(),
        assign.contiguous(),
        dx if wanted[0] else None,
        dweight if wanted[1] else None,
        samples * length,
        length,
        slots,
        dim,
        *((0, 0, 0) if grad_tokens is None else grad_tokens.stride()),
        *((0, 0, 0) if away is None else away.stride()),
        **GRADIENT_BLOCKS,
    )
    return dx, dweight


# How the tests compile every kernel: types of the run-time arguments, compile-time arguments, warps.
_STRIDES = "i64 i32 i32"
_TILE = {"TOKENS": 64, "KEYS": 16, "BLOCK": 16}
_WIDE = {"TOKENS": 64, "KEYS": 64, "BLOCK": 16}
_ROWS = {"ROWS": 8, "BLOCK": 256}
_STEP = {"TOKENS": 4, "BLOCK": 256}
_PLAIN = {"p_weight": None, "p_valid": None, "stride_d": 1}
_DX = {"p_grad_size": None, "p_x": None, "p_weight": None, "p_dweight": None, "x_b": 0, "x_n": 0, "x_d": 0}
TARGETS: list[tuple[Any, str, dict[str, Any], int]] = [
    *(
        (_assign, f"*{dtype} *i64 *i64 *fp32 *u8 *i64 *i32 i32 i32 i32 i32 {_STRIDES}", tile, 8)
        for dtype, tile in (("fp32", _TILE), ("bf16", _WIDE), ("fp16", _WIDE))
    ),
    *(
        (_assign, f"*{dtype} *i64 *i64 *i64 *i32 i32 i32 i32 i32 i64 i32", _PLAIN | tile, 8)
        for dtype, tile in (("fp32", _TILE), ("bf16", _WIDE))
    ),
    (rank_rows, "*i64 *i32 *i32 i32 i32 i32", {"QUERIES": 32, "BLOCK": 64}, 4),
    *(
        (sum_rows, f"*{dtype} *fp32 *i32 *i32 *i32 *{dtype} *fp32 i32 i32 i32 i32 {_STRIDES}", _ROWS, 4)
        for dtype in ("fp32", "bf16", "fp16")
    ),
    (
        sum_rows,
        "*fp32 *i32 *i32 *i32 *fp32 *fp32 i32 i32 i32 i32 i64 i32",
        {"p_weight": None, "stride_v": 1} | _ROWS,
        4,
    ),
    *(
        (
            _gradients,
            f"*{dtype} *fp32 *{dtype} *fp32 *{dtype} *fp32 *i64 *{dtype} *fp32 i32 i32 i32 i32 {_STRIDES} {_STRIDES}",
            _STEP,
            4,
        )
        for dtype in ("fp32", "bf16", "fp16")
    ),
    (_gradients, f"*bf16 *bf16 *fp32 *i64 *bf16 i32 i32 i32 i32 {_STRIDES}", _DX | _STEP, 4),
]
