"""Sparsify: questions about music videos, learnt without computing half of the video."""

from __future__ import annotations

__version__ = "0.1.0"
