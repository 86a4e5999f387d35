"""What all charts of a report share: colours, marks, axes, and labels at the ends of lines instead of legends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsify.report._page import FAINT, INK, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CHART", "Chart", "colour", "end_labels", "figure", "hold_texts", "mark", "tidy", "whisker", "wrap"]

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


def end_labels(axes: Axes, labels: Sequence[tuple[float, float, str, str]], *, right: float) -> None:
    """Texts (x, y, text, colour) in a column at x = ``right``, each level with the end (x, y) of its line, or moved so
    that none touches another; a hair leads from the end to its text. Needs the limits of ``axes`` set.
    """
    low, high = axes.get_ylim()
    line = (high - low) * 0.175 / (axes.get_figure().get_figheight() - 0.8)  # type: ignore[union-attr]  # a line of text
    placed = sorted(labels, key=lambda label: label[1])
    heights = [label[1] for label in placed]
    rooms = [line * (label[2].count("\n") + 1) + 0.25 * line for label in placed]
    for _ in range(500):  # neighbours push each other away until all have their room
        lacks = [(rooms[i] + rooms[i + 1]) / 2 - (heights[i + 1] - heights[i]) for i in range(len(heights) - 1)]
        for i, lack in enumerate(lacks):
            if lack > 1e-9:
                heights[i] -= lack / 2
                heights[i + 1] += lack / 2
        shift = max(0.0, low + rooms[0] / 2 - heights[0]) if heights else 0.0
        heights = [height + shift if i == 0 else height for i, height in enumerate(heights)]
        if not shift and all(lack <= 1e-9 for lack in lacks):
            break
    for (x, y, text, shade), height in zip(placed, heights, strict=True):
        axes.plot([x, right], [y, height], color=shade, linewidth=0.7, alpha=0.6, clip_on=False, zorder=1, gid="leader")
        axes.annotate(
            text,
            (right, height),
            xytext=(4, 0),
            textcoords="offset points",
            color=shade,
            va="center",
            fontsize=9,
            linespacing=1.15,
            weight="bold",
            annotation_clip=False,
        )


def hold_texts(axes: Axes) -> None:
    """Lengthen the x axis, which begins at 0, until no text that begins in ``axes`` ends beyond them."""
    made = axes.get_figure()
    assert made is not None
    made.draw_without_rendering()  # type: ignore[union-attr]  # lays out: only then texts have a width
    needed = [axes.get_xlim()[1]]
    for text in axes.texts:
        share = min(0.9, text.get_window_extent().width / axes.bbox.width)
        needed.append(text.get_position()[0] / (1 - share))
    axes.set_xlim(0, max(needed))


def wrap(text: str, width: int = 24) -> str:
    """``text`` in lines of at most ``width`` characters, broken after a comma where that fits."""
    import textwrap

    parts = text.split(", ")
    if len(text) > width and len(parts) > 1 and all(len(part) < width for part in parts):
        lines = [parts[0]]
        for part in parts[1:]:
            joined = f"{lines[-1]}, {part}"
            lines[-1:] = [joined] if len(joined) <= width else [f"{lines[-1]},", part]
        return "\n".join(lines)
    return "\n".join(textwrap.wrap(text, width)) or text
