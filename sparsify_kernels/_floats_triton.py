"""Half precision in Triton, under its interpreter too.

Alphabet: ``b_`` blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "narrowed", "widened"]

# Triton's interpreter computes with the bits of a bf16 as if they were an integer: there, numbers are widened as soon
# as they are loaded, and rounded by hand.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def widened(b_x):
    """Half precision as fp32; fp32 and fp64 as they are."""
    if b_x.dtype == tl.bfloat16 and INTERPRETED:
        b_wide = (b_x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif b_x.dtype == tl.float64:
        b_wide = b_x
    else:
        b_wide = b_x.to(tl.float32)
    return b_wide


@triton.jit
def narrowed(b_x, dtype: tl.constexpr):
    """``b_x`` rounded to ``dtype``, to nearest, ties to even."""
    if dtype == tl.bfloat16 and INTERPRETED:
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_bits = tl.where(b_x == b_x, b_bits + 0x7FFF + ((b_bits >> 16) & 1), 0x7FC00000)
        b_narrow = (b_bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        b_narrow = b_x.to(dtype)
    return b_narrow
