"""A figure addressed in inches from its upper left corner, with the look that all pictures share."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ACCENT", "FAINT", "INK", "STYLE", "Page"]

DPI = 130
INK, FAINT, ACCENT = "#1b1f24", "#5d6670", "#2f6fde"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # a question may hold dollar signs
    "hatch.linewidth": 0.7,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "svg.hashsalt": "sparsify",
}


class Page:
    """A white page of ``width`` x ``height`` inches. Make and use it under ``matplotlib.rc_context(STYLE)``."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes whose upper left corner is at (x, y)."""
        box = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Text whose upper left corner (or ``ha``, ``va``) is at (x, y)."""
        self.figure.text(x / self.width, 1 - y / self.height, text, **({"va": "top", "ha": "left"} | style))

    def save(self, path: Path) -> None:
        """Write beside the target, then move: the file appears whole or not at all."""
        handle, name = tempfile.mkstemp(suffix=path.suffix.lower(), dir=path.parent)
        os.close(handle)
        try:
            self.figure.savefig(name)
            os.chmod(name, 0o644)  # mkstemp makes it readable by its owner alone
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
