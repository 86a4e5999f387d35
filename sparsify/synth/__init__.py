"""Rendered performances with questions that are true by construction: the built-in data set."""

from __future__ import annotations

from sparsify.synth.standins import write_standins
from sparsify.synth.writer import write

__all__ = ["write", "write_standins"]
