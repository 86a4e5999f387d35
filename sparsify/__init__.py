"""Sparsify: questions about music videos, answered without computing most of the video."""

from __future__ import annotations

__version__ = "0.1.0"
