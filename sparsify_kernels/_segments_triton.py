"""Sums of rows by destination in Triton, for every op that has them: without atomics, and the same bits on every run.

Two kernels. ``rank_rows`` lists the rows of each segment in ascending order: the place of a row in that list is the
number of rows with a smaller (segment, row), which each program counts for some rows by comparing them with all rows of
their sample. N^2 comparisons of integers a sample are a fraction of the time that moving N rows takes, need no sort,
no scan and no memory that was cleared first, and split into as many programs as there are blocks of rows.
``sum_rows`` reads the rows of a segment, a few at a time, and nothing else: every row is read once, in its own
precision, and summed in fp32. (A product with a one-hot matrix would round fp32 rows, or weights to bf16, and a NaN in
one segment would reach all others.)

Alphabet: ``i_`` ids, ``o_`` offsets, ``m_`` masks, ``p_`` pointers, ``b_`` blocks. Offsets into tensors are int64
before the first multiply. Where a pointer may be None, the kernel is compiled without what it is for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsify_kernels._floats_triton import INTERPRETED, narrowed, widened

__all__ = ["RANK_BLOCKS", "SUM_BLOCKS", "rank_programs", "rank_rows", "sum_rows", "value_blocks"]

# Smaller under the interpreter, so that small inputs, which it is fast enough for, take several blocks.
RANK_BLOCKS = {"QUERIES": 16, "BLOCK": 16} if INTERPRETED else {"QUERIES": 32, "BLOCK": 64}
SUM_BLOCKS = {"ROWS": 4, "BLOCK": 32} if INTERPRETED else {"ROWS": 8, "BLOCK": 256}


@triton.jit
def rank_rows(p_segment, p_start, p_members, rows, segments, programs, QUERIES: tl.constexpr, BLOCK: tl.constexpr):
    """members[b] = the rows of sample b by segment, then by row; start[b, s] = where those of segment s begin.

    ``segment`` int64 [B, rows]; rows whose segment is outside [0, segments) are left out. ``start`` [B, segments + 1],
    ``members`` [B, rows]. The first ``rows`` queries of a sample are its rows, the others the beginnings of the
    segments: each asks how many rows come before it. ``programs`` a sample.
    """
    i_b = tl.program_id(0).to(tl.int64) // programs
    o_query = (tl.program_id(0).to(tl.int64) % programs) * QUERIES + tl.arange(0, QUERIES)  # [QUERIES]
    m_row = o_query < rows
    b_segment = tl.load(p_segment + i_b * rows + o_query, mask=m_row, other=-1)
    b_place = tl.where(m_row, b_segment * rows + o_query, (o_query - rows) * rows)  # one number for (segment, row)
    b_before = tl.full([QUERIES, BLOCK], 0, tl.int32)
    for first in range(0, rows, BLOCK):
        o_row = first + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
        b_other = tl.load(p_segment + i_b * rows + o_row, mask=o_row < rows, other=-1)
        m_other = (b_other >= 0) & (b_other < segments)
        b_other = tl.where(m_other, b_other * rows + o_row, 0x7FFFFFFFFFFFFFFF)
        b_before += (b_other[None, :] < b_place[:, None]).to(tl.int32)
    b_rank = tl.sum(b_before, 1)  # [QUERIES]
    m_row = m_row & (b_segment >= 0) & (b_segment < segments)
    tl.store(p_members + i_b * rows + b_rank, o_query.to(tl.int32), mask=m_row)
    o_start = o_query - rows
    tl.store(p_start + i_b * (segments + 1) + o_start, b_rank, mask=(o_start >= 0) & (o_start <= segments))


@triton.jit
def sum_rows(
    p_rows,
    p_weight,
    p_start,
    p_members,
    p_bad,
    p_out,
    p_size,
    rows,
    segments,
    values,
    bads,
    stride_b,
    stride_n,
    stride_v,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[b, s] = the sum of the rows of segment s; with ``size``, their mean weighed by ``weight`` (None: 1), and
    size[b, s] = the sum of their weights.

    ``rows`` [B, rows, values] with strides, ``out`` [B, segments, values]; ``start`` and ``members`` as ``rank_rows``
    left them. A mean of weight 0 is 0. A sample with any of its ``bads`` elements of ``bad`` set is NaN. Program
    (b * segments + s, block of values).
    """
    i_out = tl.program_id(0).to(tl.int64)
    i_b, i_s = i_out // segments, i_out % segments
    o_value = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_value = o_value < values
    begin = tl.load(p_start + i_b * (segments + 1) + i_s)
    end = tl.load(p_start + i_b * (segments + 1) + i_s + 1)
    SUMS: tl.constexpr = tl.float64 if p_rows.dtype.element_ty == tl.float64 else tl.float32
    b_sum = tl.full([ROWS, BLOCK], 0.0, SUMS)
    b_weights = tl.full([ROWS], 0.0, SUMS)
    for first in range(begin, end, ROWS):
        o_member = first + tl.arange(0, ROWS)  # [ROWS]
        m_member = o_member < end
        o_row = tl.load(p_members + i_b * rows + o_member, mask=m_member, other=0).to(tl.int64)
        p_block = p_rows + i_b * stride_b + o_row[:, None] * stride_n + o_value[None, :] * stride_v
        b_rows = tl.load(p_block, mask=m_member[:, None] & m_value[None, :], other=0.0)  # [ROWS, BLOCK]
        if b_rows.dtype != SUMS:
            b_rows = widened(b_rows)
        if p_weight is not None:
            b_weight = tl.load(p_weight + i_b * rows + o_row, mask=m_member, other=0.0)
            b_rows *= b_weight[:, None]
            b_weights += b_weight
        b_sum += b_rows
    b_out = tl.sum(b_sum, 0)  # [BLOCK]
    if p_size is not None:
        size = (end - begin).to(SUMS)
        if p_weight is not None:
            size = tl.sum(b_weights, 0)
        b_out = tl.where(size > 0, tl.div_rn(b_out, tl.where(size > 0, size, 1.0)), 0.0)
        bad = begin * 0
        for first in range(0, bads, 128):
            o_bad = first + tl.arange(0, 128)
            bad = tl.maximum(bad, tl.max(tl.load(p_bad + i_b * bads + o_bad, mask=o_bad < bads, other=0), 0))
        b_out = tl.where(bad > 0, float("nan"), b_out)
        tl.store(p_size + i_out, tl.where(bad > 0, float("nan"), size), mask=tl.program_id(1) == 0)
    if p_out.dtype.element_ty != SUMS:
        b_out = narrowed(b_out, p_out.dtype.element_ty)
    tl.store(p_out + i_out * values + o_value, b_out, mask=m_value)


def rank_programs(rows: int, segments: int) -> int:
    """Programs a sample of ``rank_rows``."""
    return triton.cdiv(rows + segments + 1, RANK_BLOCKS["QUERIES"])


def value_blocks(values: int) -> int:
    """Programs a segment of ``sum_rows``: one even without values, for the sizes."""
    return max(1, triton.cdiv(values, SUM_BLOCKS["BLOCK"]))
