"""The right column of an explaining picture: questions with their likeliest answers, and the legend."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsify.report._page import ACCENT, FAINT, INK, Page

if TYPE_CHECKING:
    from sparsify.ask import Answer

__all__ = ["answers_height", "draw_answers", "draw_legend", "legend_height"]

SHOWN = 5  # answers a question
LINE, BAR = 0.175, 0.205  # inches: a line of text, a bar with its gap
_COLUMNS = 46  # characters of question text that fit the column


def _wrapped(question: str) -> list[str]:
    lines = textwrap.wrap(question, _COLUMNS, break_long_words=True) or [""]
    return lines if len(lines) <= 4 else [*lines[:3], lines[3][: _COLUMNS - 1] + "…"]


def _height(answer: Answer) -> float:
    return len(_wrapped(answer.question)) * LINE + 0.08 + bool(answer.unknown) * LINE + SHOWN * BAR + 0.2


def answers_height(answers: Sequence[Answer], limit: int) -> float:
    """Inches that the first ``limit`` of ``answers`` take."""
    return sum(_height(answer) for answer in answers[:limit]) + (0.45 if len(answers) > limit else 0.2)


def draw_answers(page: Page, x: float, y: float, width: float, bottom: float, answers: Sequence[Answer]) -> None:
    """Each question with its likeliest answers as bars, from ``y`` down to ``bottom``; what does not fit is counted."""
    for n, answer in enumerate(answers):
        if y + _height(answer) > bottom:
            page.text(x, y, f"… and {len(answers) - n} more", color=FAINT)
            return
        for line in _wrapped(answer.question):
            page.text(x, y, line, weight="bold", size=9.5)
            y += LINE
        if answer.unknown:
            words = ", ".join(answer.unknown)
            page.text(
                x,
                y,
                "unknown: " + (words if len(words) < 44 else words[:43] + "…"),
                size=8,
                color="#b3541e",
                style="italic",
            )
            y += LINE
        y += 0.08
        _bars(page, x, y, width, answer)
        y += SHOWN * BAR + 0.2


def _bars(page: Page, x: float, y: float, width: float, answer: Answer) -> None:
    label, number = 1.2, 0.55  # inches: left and right of the bars
    axes = page.axes(x + label, y, width - label - number, SHOWN * BAR)
    axes.set(xlim=(0, 1), ylim=(SHOWN, 0))
    axes.axis("off")
    for n, (text, probability) in enumerate(answer.ranked[:SHOWN]):
        axes.barh(n + 0.5, 1, height=0.66, color="#eef0f3")
        axes.barh(n + 0.5, probability, height=0.66, color=ACCENT if n == 0 else "#9db8ee")
        style = {"va": "center", "size": 9, "weight": "bold" if n == 0 else "normal", "color": INK if n == 0 else FAINT}
        middle = y + (n + 0.5) * BAR
        page.text(x + label - 0.08, middle, text, ha="right", **style)
        page.text(x + width, middle, f"{probability:.1%}", ha="right", **style)


def legend_height(*, merged: bool) -> float:
    """Inches that the legend takes."""
    return 2.5 if merged else 1.5


def draw_legend(page: Page, x: float, y: float, *, masked: bool, merged: bool, brightest: float) -> None:
    """What hatching, outlines, tints and heat mean; ``brightest`` is the attention shown in the brightest colour."""
    from matplotlib.patches import Rectangle

    page.text(x, y, "how to read it", size=11, weight="bold")
    plain: dict[str, Any] = {"facecolor": "none", "edgecolor": "#9aa1ab", "linewidth": 0.8}
    rows: list[tuple[dict[str, Any], str]] = []
    if masked:
        rows.append((plain | {"facecolor": "#e9ebee", "hatch": "/////"}, "masked: hidden from the model"))
    else:
        rows.append((plain, "nothing was masked: everything was seen"))
    if merged:
        rows.append(
            ({"facecolor": "#8b8f96", "edgecolor": "#ff9f1c", "linewidth": 2.6}, "key token (wider: more attention)")
        )
        rows.append(({"facecolor": "#ffcf8f"}, "merged into the key of this colour,\nin any picture of the row"))
    else:
        rows.append((plain, "merging is off: every token was kept"))
    y += 0.42
    page.text(x + 0.03, y, "▼", va="center", size=8)
    page.text(x + 0.16, y, "▬", va="center", size=10, color="#b7cbf3")
    page.text(x + 0.45, y, "a frame, an audio segment, on the clip", va="center", size=9)
    y += 0.3
    for style, text in rows:
        two_lines = "\n" in text
        y += 0.06 * two_lines
        axes = page.axes(x, y - 0.1, 0.32, 0.2)
        axes.axis("off")
        axes.add_patch(Rectangle((0.06, 0.06), 0.88, 0.88, **style))
        page.text(x + 0.45, y, text, va="center", size=9)
        y += 0.3 + 0.06 * two_lines
    if merged:
        _heat_scale(page, x, y - 0.04, brightest)


def _heat_scale(page: Page, x: float, y: float, brightest: float) -> None:
    import numpy as np

    axes = page.axes(x, y, 1.5, 0.14)
    axes.imshow(np.linspace(0, 1, 128)[None], cmap="inferno", aspect="auto", extent=(0, brightest, 0, 1))
    axes.set_yticks([])
    axes.set_xticks([0, 1, brightest], ["0", "mean", f"{brightest:.1f} x"], fontsize=7.5)
    axes.tick_params(length=2, pad=1.5)
    page.text(x + 1.65, y + 0.07, "attention received from\nthe other modality", va="center", size=9)
