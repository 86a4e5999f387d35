"""What all charts of a report share: colours, marks, axes, and labels at the ends of lines instead of legends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsify.report._page import FAINT, INK, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CHART", "Chart", "colour", "end_labels", "figure", "mark", "tidy", "whisker", "wrap"]

# Okabe and Ito's colours, told apart by every kind of colour vision; the order keeps neighbours apart in print, too.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4d4d4d", "#8c6d1f")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "h")
GRID = "#e4e7eb"
CHART: dict[Any, Any] = STYLE | {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": "#9aa1ab",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "svg.fonttype": "path",
    "figure.facecolor": "white",
}


class Chart(NamedTuple):
    """A figure of the page."""

    name: str  # of its PNG
    figure: Figure
    alt: str  # what a reader who does not see it should know
    caption: str


def figure(width: float = 7.2, height: float = 3.6) -> Figure:
    """An empty figure of so many inches. Draw it under ``matplotlib.rc_context(CHART)``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(made)
    return made


def colour(number: int) -> str:
    return PALETTE[number % len(PALETTE)]


def mark(number: int) -> str:
    return MARKS[number % len(MARKS)]


def tidy(axes: Axes, *, grid: str = "y") -> None:
    """A light grid behind the data, no frame above and right."""
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    axes.tick_params(length=3)


def whisker(axes: Axes, position: float, low: float, high: float, *, vertical: bool = False) -> None:
    """From the least to the largest of several seeds."""
    if high <= low:
        return
    line = ([position, position], [low, high]) if vertical else ([low, high], [position, position])
    axes.plot(*line, color=INK, linewidth=1.3, solid_capstyle="butt", gid="whisker")


def end_labels(axes: Axes, labels: Sequence[tuple[float, float, str, str]], *, gap: float) -> None:
    """Texts (x, y, text, colour) right of the ends of lines, moved apart to ``gap`` (in units of y) where they touch."""
    placed = sorted(labels, key=lambda label: label[1])
    heights = [label[1] for label in placed]
    for _ in range(200):  # neighbours push each other away until all have their room
        moved = False
        for i in range(len(heights) - 1):
            lack = gap - (heights[i + 1] - heights[i])
            if lack > 1e-9:
                heights[i] -= lack / 2
                heights[i + 1] += lack / 2
                moved = True
        if not moved:
            break
    for (x, _, text, shade), height in zip(placed, heights, strict=True):
        axes.annotate(
            text,
            (x, height),
            xytext=(8, 0),
            textcoords="offset points",
            color=shade,
            va="center",
            fontsize=9,
            weight="bold",
            annotation_clip=False,
        )


def wrap(text: str, width: int = 24) -> str:
    """``text`` in lines of at most ``width`` characters."""
    import textwrap

    return "\n".join(textwrap.wrap(text, width)) or text
