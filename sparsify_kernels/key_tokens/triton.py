"""key_tokens in Triton: one kernel finds quartiles, threshold and keys of a sample; gathering moves bytes.

The scores of a sample, as integers of the same order, stay in the registers of one program. An order statistic is
found bit by bit: the greatest bound that no more scores lie below than its rank says. The two quartiles are sought
together, so that a bit costs one pass over the registers and one sum; the last key that there is a slot for is sought
only if there are too many candidates. Then one scan tells each key its slot.

The index is the reference's on every input: comparisons are of integers, the threshold is fp64, and the kernel is
compiled without fused multiply-adds, so that the product with the fence is rounded by itself.

Alphabet: ``i_`` ids, ``o_`` offsets, ``m_`` masks, ``p_`` pointers, ``b_`` blocks. Offsets into tensors are int64
before the first multiply.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify_kernels._floats_triton import INTERPRETED, widened
from sparsify_kernels._segments_triton import RANK_BLOCKS, SUM_BLOCKS, rank_programs, rank_rows, sum_rows, value_blocks
from sparsify_kernels.key_tokens import reference
from sparsify_kernels.random_mask.triton import as_integers

__all__ = ["TARGETS", "key_tokens", "key_tokens_gather", "key_tokens_gather_backward"]

LARGEST = 16384  # tokens of which one program finds the keys; beyond, the reference's sort does
PART = 256 if INTERPRETED else 2048  # of them that it puts into slots at a time; several parts even of small inputs
BLOCK_VALUES = 2048  # values that one program moves


@triton.jit
def _ordered(b_score):
    """fp32 as int32 of the same order, -0 as +0. The lowest of them, for -inf, is above the lowest int32."""
    b_bits = b_score.to(tl.int32, bitcast=True)
    b_bits = tl.where(b_score == 0.0, 0, b_bits)
    return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _number(ordered):
    """The fp64 number that ``_ordered`` made into an integer."""
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _quartile(low, above, quarters):
    """Between the numbers of ``low`` and ``above``, ``quarters`` of the way; the reference says why in this way."""
    a, b = _number(low), _number(above)
    part = quarters.to(tl.float64) * 0.25
    between = tl.where(part < 0.5, a + part * (b - a), b - (1.0 - part) * (b - a))
    between = tl.where(b == float("inf"), b, between)
    return tl.where((a == b) | (a == -float("inf")), a, between)


@triton.jit
def _keys(p_score, p_valid, m_sample, o_token, tokens, stride_n, valid_n):
    """The scores of ``o_token`` [1, n] as ``_ordered`` has them, NaN as -inf; the lowest int32 where there is no valid
    token."""
    m_valid = m_sample & (o_token < tokens)  # [SAMPLES, n]
    b_score = tl.load(p_score + o_token.to(tl.int64) * stride_n, mask=m_valid, other=0.0)
    if b_score.dtype != tl.float32:
        b_score = widened(b_score).to(tl.float32)
    if p_valid is not None:
        m_valid = m_valid & (tl.load(p_valid + o_token.to(tl.int64) * valid_n, mask=m_valid, other=0) != 0)
    b_score = tl.where(b_score == b_score, b_score, -float("inf"))  # NaN is the only number unlike itself
    return tl.where(m_valid, _ordered(b_score), -0x80000000)


@triton.jit
def _pick(
    p_scores,
    p_valid,
    p_index,
    p_count,
    samples,
    tokens,
    slots,
    fence: tl.float64,
    stride_b,
    stride_n,
    valid_b,
    valid_n,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """The keys of SAMPLES samples: index[b] ascending, -1 beyond count[b]."""
    NOWHERE: tl.constexpr = -0x80000000  # below every score: where there is no valid token
    o_sample = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)  # [SAMPLES]
    m_sample = o_sample < samples
    o_b = o_sample[:, None]  # [SAMPLES, 1]
    p_score, p_there = p_scores + o_b * stride_b, p_valid
    if p_valid is not None:
        p_there = p_valid + o_b * valid_b
    b_key = _keys(p_score, p_there, m_sample[:, None], tl.arange(0, BLOCK)[None, :], tokens, stride_n, valid_n)

    n = tl.sum((b_key > NOWHERE).to(tl.int32), 1)  # [SAMPLES], as all that follows
    last = tl.maximum(n - 1, 0)
    rank1 = BLOCK - n + last // 4  # of the block, whose lowest are not valid
    rank3 = BLOCK - n + last * 3 // 4
    low1 = tl.full([SAMPLES], NOWHERE, tl.int32)
    low3 = low1
    for step in range(32):
        bit = tl.full([SAMPLES], 1, tl.int32) << (31 - step)  # from NOWHERE up, the sign counts as the highest bit
        up1, up3 = low1 ^ bit, low3 ^ bit
        # Two counts in one sum: they are below 2^15.
        below = tl.sum((b_key < up1[:, None]).to(tl.int32) + ((b_key < up3[:, None]).to(tl.int32) << 16), 1)
        low1 = tl.where((below & 0xFFFF) <= rank1, up1, low1)
        low3 = tl.where((below >> 16) <= rank3, up3, low3)

    # The next rank holds the same score where more scores than the rank says are no higher.
    no_higher = tl.sum((b_key <= low1[:, None]).to(tl.int32) + ((b_key <= low3[:, None]).to(tl.int32) << 16), 1)
    above1 = tl.min(tl.where(b_key > low1[:, None], b_key, 0x7FFFFFFF), 1)
    above3 = tl.min(tl.where(b_key > low3[:, None], b_key, 0x7FFFFFFF), 1)
    above1 = tl.where((last % 4 == 0) | ((no_higher & 0xFFFF) > rank1 + 1), low1, above1)
    above3 = tl.where((last * 3 % 4 == 0) | ((no_higher >> 16) > rank3 + 1), low3, above3)
    q1, q3 = _quartile(low1, above1, last % 4), _quartile(low3, above3, last * 3 % 4)
    spread = tl.where(q3 == q1, 0.0, q3 - q1)  # equal infinities have no spread
    threshold = q3 + tl.where(fence > 0, spread * fence, 0.0)

    # The keys are all above `border`, and the first at it where the candidates do not fit.
    nearest = threshold.to(tl.float32)
    border = _ordered(nearest) - (nearest.to(tl.float64) >= threshold).to(tl.int32)  # the highest score below it
    candidates = tl.sum((b_key > border[:, None]).to(tl.int32), 1)
    count = tl.where(n > 0, tl.minimum(tl.maximum(candidates, 1), slots), 0)
    border = tl.where(candidates == 0, tl.max(b_key, 1), border)
    if tl.max(candidates, 0) > slots:
        least = tl.full([SAMPLES], NOWHERE, tl.int32)
        for step in range(32):
            up = least ^ (tl.full([SAMPLES], 1, tl.int32) << (31 - step))
            below = tl.sum((b_key < up[:, None]).to(tl.int32), 1)
            least = tl.where(below <= BLOCK - slots, up, least)
        border = tl.where(candidates > slots, least, border)
    ties = count - tl.sum((b_key > border[:, None]).to(tl.int32), 1)

    # In parts, read anew: fewer registers than for all of them at once.
    above, equal = count * 0, count * 0  # in the parts so far
    p_slots = p_index + o_b * slots
    for first in range(0, BLOCK, PART):
        o_token = first + tl.arange(0, PART)[None, :]  # [1, PART]
        b_part = _keys(p_score, p_there, m_sample[:, None], o_token, tokens, stride_n, valid_n)
        m_above = b_part > border[:, None]  # [SAMPLES, PART]
        m_equal = (b_part == border[:, None]) & (b_part > NOWHERE)
        b_both = m_above.to(tl.int32) | (m_equal.to(tl.int32) << 16)
        b_seen = tl.cumsum(b_both, 1)
        b_equal = equal[:, None] + (b_seen >> 16)
        m_key = m_above | (m_equal & (b_equal <= ties[:, None]))
        o_slot = above[:, None] + (b_seen & 0xFFFF) + tl.minimum(b_equal, ties[:, None]) - 1
        tl.store(p_slots + o_slot, (o_token + o_slot * 0).to(tl.int64), mask=m_key)
        m_rest = m_sample[:, None] & (o_token >= count[:, None]) & (o_token < slots)
        tl.store(p_slots + o_token, tl.full([SAMPLES, PART], -1, tl.int64), mask=m_rest)
        seen = tl.sum(b_both, 1)
        above, equal = above + (seen & 0xFFFF), equal + (seen >> 16)
    tl.store(p_count + o_sample, count.to(tl.int64), mask=m_sample)


@triton.jit
def _gather(
    p_x,
    p_index,
    p_out,
    rows,
    slots,
    tokens,
    values,
    wrong,
    stride_b,
    stride_n,
    stride_v,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[b, j] = x[b, index[b, j]], 0 at -1, ``wrong`` at any other index; ``rows`` = B * slots. Program (block of
    rows, block of values)."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    o_value = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    m_row, m_value = o_row < rows, o_value < values
    b_index = tl.load(p_index + o_row, mask=m_row, other=-1)  # [ROWS, 1]
    m_there = m_row & (b_index >= 0) & (b_index < tokens)
    p_token = p_x + (o_row // slots) * stride_b + tl.where(m_there, b_index, 0) * stride_n
    b_x = tl.load(p_token + o_value * stride_v, mask=m_there & m_value, other=0)
    b_blank = tl.where(b_index == -1, 0, wrong).to(b_x.dtype)
    tl.store(p_out + o_row * values + o_value, tl.where(m_there, b_x, b_blank), mask=m_row & m_value)


def key_tokens(scores: Tensor, valid: Tensor | None, fence: float, capacity: int | None) -> tuple[Tensor, Tensor]:
    """The op on CUDA tensors (CPU tensors under the interpreter); arguments as ``reference.key_tokens``."""
    samples, tokens = scores.shape
    if tokens > LARGEST:
        return reference.key_tokens(scores, valid, fence, capacity)
    reference.check_scores(scores, valid)
    slots = reference.capacity_of(tokens, capacity)
    index = scores.new_empty((samples, slots), dtype=torch.int64)
    count = scores.new_empty((samples,), dtype=torch.int64)
    if samples:
        block = max(64, triton.next_power_of_2(tokens))
        there = None if valid is None else valid.view(torch.uint8)
        strides = (*scores.stride(), *((0, 0) if there is None else there.stride()))
        # fence as a float64: an fp32 argument, which Triton makes of a float, would move the threshold.
        per_program = 8 if INTERPRETED else 1  # what the interpreter takes long for is the number of operations
        _pick[(triton.cdiv(samples, per_program),)](
            scores,
            there,
            index,
            count,
            samples,
            tokens,
            slots,
            float(fence),
            *strides,
            SAMPLES=per_program,
            BLOCK=block,
            PART=min(block, PART),
            num_warps=_warps(block),
            enable_fp_fusion=False,
        )
    return index, count


def key_tokens_gather(x: Tensor, index: Tensor) -> Tensor:
    """``reference.key_tokens_gather`` on CUDA tensors (CPU tensors under the interpreter)."""
    samples, tokens = x.shape[:2]
    slots = index.shape[1]
    reference.check_index(index, tokens)
    out = x.new_empty((samples, slots, *x.shape[2:]))
    if out.numel():
        # All bits set is a NaN, but not in formats without negative zero, which have their one NaN in its place.
        wrong = 0 if not x.dtype.is_floating_point else -128 if "fnuz" in str(x.dtype) else -1
        source, target = as_integers(_flat(x)), as_integers(_flat(out))
        values = source.shape[2]
        block = min(BLOCK_VALUES, triton.next_power_of_2(values))
        blocks = {"ROWS": BLOCK_VALUES // block, "BLOCK": block}
        grid = (triton.cdiv(samples * slots, blocks["ROWS"]), triton.cdiv(values, block))
        sizes = (samples * slots, slots, tokens, values)
        _gather[grid](source, index.contiguous(), target, *sizes, wrong, *source.stride(), **blocks)
    return out


def key_tokens_gather_backward(grad: Tensor, index: Tensor, tokens: int) -> Tensor:
    """``reference.key_tokens_gather_backward`` on CUDA tensors (CPU tensors under the interpreter)."""
    samples, slots = index.shape
    out = grad.new_empty((samples, tokens, *grad.shape[2:]))
    if out.numel():
        source, target = (torch.view_as_real(t) if t.is_complex() else t for t in (grad.resolve_conj(), out))
        source, target = _flat(source), _flat(target)
        values = source.shape[2]
        start = index.new_empty((samples, tokens + 1), dtype=torch.int32)
        members = index.new_empty((samples, slots), dtype=torch.int32)
        programs = rank_programs(slots, tokens)
        rank_rows[(samples * programs,)](index.contiguous(), start, members, slots, tokens, programs, **RANK_BLOCKS)
        grid = (samples * tokens, value_blocks(values))
        sizes = (slots, tokens, values, 0)
        sum_rows[grid](source, None, start, members, None, target, None, *sizes, *source.stride(), **SUM_BLOCKS)
    return out


def _warps(block: int) -> int:
    return 4 if block <= 1024 else 8 if block <= 4096 else 16


def _flat(x: Tensor) -> Tensor:
    """[B, N, ...] as [B, N, values]."""
    return x.unsqueeze(2) if x.dim() == 2 else x.flatten(2)


# How the tests compile every kernel: types of the run-time arguments, compile-time arguments, warps.
_PICK = "i32 i32 i32 fp64 i64 i32"
_ONE = {"p_weight": None, "p_bad": None, "p_size": None}
TARGETS: list[tuple[Any, str, dict[str, Any], int]] = [
    (
        _pick,
        f"*fp32 *i64 *i64 {_PICK}",
        {"p_valid": None, "valid_b": 0, "valid_n": 0, "SAMPLES": 1, "BLOCK": 64, "PART": 64},
        4,
    ),
    (_pick, f"*bf16 *u8 *i64 *i64 {_PICK} i64 i32", {"SAMPLES": 1, "BLOCK": 1024, "PART": 1024}, 4),
    (_pick, f"*fp16 *u8 *i64 *i64 {_PICK} i64 i32", {"SAMPLES": 1, "BLOCK": 4096, "PART": PART}, 8),
    (_pick, f"*fp64 *u8 *i64 *i64 {_PICK} i64 i32", {"SAMPLES": 1, "BLOCK": LARGEST, "PART": PART}, 16),
    (_pick, f"*fp32 *u8 *i64 *i64 {_PICK} i64 i32", {"SAMPLES": 1, "BLOCK": LARGEST, "PART": PART}, 16),
    (_gather, "*i16 *i64 *i16 i32 i32 i32 i32 i32 i64 i32 i32", {"ROWS": 1, "BLOCK": BLOCK_VALUES}, 4),
    (_gather, "*i64 *i64 *i64 i32 i32 i32 i32 i32 i64 i32 i32", {"ROWS": BLOCK_VALUES, "BLOCK": 1}, 4),
    (rank_rows, "*i64 *i32 *i32 i32 i32 i32", {"QUERIES": 32, "BLOCK": 64}, 4),
    *(
        (sum_rows, f"*{t} *i32 *i32 *{t} i32 i32 i32 i32 i64 i32 i32", _ONE | {"ROWS": 8, "BLOCK": 256}, 4)
        for t in ("fp64", "fp32", "bf16", "fp16")
    ),
]
