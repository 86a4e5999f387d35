"""How the attention kernels in Triton are launched: what a tile takes, and how products of fp32 are made."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["PRECISION", "Tiles"]

# Products of fp32 without its last bits would not be fp32: AMD multiplies it whole, NVIDIA as three products of tf32.
PRECISION = {"cuda": "tf32x3", "hip": "ieee"}


class Tiles(NamedTuple):
    """Queries and keys in a tile, warps, stages of the pipeline."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int
