"""Charts of what checkpoints were asked: keep ratios, fences, likeness of neighbours, and what a key subset kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sparsify.report._charts import Chart, colour, end_labels, figure, mark, tidy, wrap
from sparsify.report._page import FAINT, INK
from sparsify.report.kept import Kept, Share
from sparsify.report.runs import Group

__all__ = ["accuracy_against", "kept_by", "likeness"]

Points = Sequence[tuple[float, float, float]]  # x, accuracy in [0, 1], super-tokens a video


def accuracy_against(what: str, curves: Sequence[tuple[Group, Points]], floor: float | None) -> Chart:
    """Accuracy in percent over the share of the input that is kept (``what`` is ``keep``), or over the ``fence``."""
    made = figure(7.2, max(3.7, 1.2 + 0.42 * len(curves)))
    axes = made.add_subplot()
    labels, values = [], []
    for group, points in curves:
        x = [100 * point[0] if what == "keep" else point[0] for point in points]
        y = [100 * point[1] for point in points]
        order = sorted(range(len(x)), key=x.__getitem__)
        x, y = [x[i] for i in order], [y[i] for i in order]
        axes.plot(x, y, color=colour(group.number), marker=mark(group.number), markersize=5, linewidth=1.9)
        if what == "fence":
            for i, place in enumerate(order):
                axes.annotate(f"{points[place][2]:.0f}", (x[i], y[i]), xytext=(0, 7), textcoords="offset points",
                              ha="center", fontsize=7.5, color=FAINT)  # fmt: skip
        labels.append((x[-1], y[-1], wrap(f"{group.name} {y[-1]:.1f} %", 25), colour(group.number)))
        values += y
    low, high = min(values), max(values)
    if floor is not None:
        axes.axhline(100 * floor, color="#8a929c", linestyle="--", linewidth=1)
        labels.append((0, 100 * floor, f"floor {100 * floor:.1f} %", FAINT))
        low, high = min(low, 100 * floor), max(high, 100 * floor)
    room = max(1.0, 0.08 * (high - low))
    right = 100.0 if what == "keep" else max(point[0] for _, points in curves for point in points)
    axes.set(xlim=(0 if what == "keep" else -0.03 * right, 1.03 * right), ylim=(low - room, high + 1.6 * room))
    labels = [(right if x == 0 else x, y, text, shade) for x, y, text, shade in labels]
    end_labels(axes, labels, right=1.06 * right)
    axes.set_ylabel("accuracy, percent")
    axes.set_xlabel(
        "share of the input that is kept, percent"
        if what == "keep"
        else "fence: key tokens score above Q3 + fence x (Q3 - Q1)"
    )
    tidy(axes)
    ends = "; ".join(
        f"{g.name} from {100 * min(p[1] for p in points):.1f} to {100 * max(p[1] for p in points):.1f} %"
        for g, points in curves
    )
    caption = {
        "keep": "Accuracy of the best checkpoint on the judged split when it is shown less of the input.",
        "fence": "Accuracy of the best checkpoint on the judged split with other fences, unmasked. Small: super-tokens "
        "a video, on average.",
    }[what]
    return Chart(f"accuracy_against_{what}", made, f"Lines of accuracy against {what}: {ends}.", caption)


def likeness(found: Mapping[str, Sequence[float]], name: str, what: str) -> Chart:
    """Percentiles 5, 25, 50, 75, 95 of the cosine between related tokens: a hair, a bar and a stroke a relation."""
    frames = [kind for kind in found if kind.endswith("place") and "segment" not in kind]
    sound = [kind for kind in found if kind not in frames]
    rows = [*frames, *sound]
    made = figure(7.2, 1.1 + 0.46 * len(rows))
    axes = made.add_subplot()
    for place, kind in enumerate(rows):
        low, quarter, middle, three, high = found[kind]
        shade = "#8a929c" if kind.startswith("another clip") else colour(0 if kind in frames else 1)
        axes.plot([low, high], [place, place], color=shade, linewidth=1.4)
        axes.barh(place, three - quarter, left=quarter, height=0.42, color=shade)
        axes.plot([middle, middle], [place - 0.21, place + 0.21], color="white", linewidth=2.2, gid="median")
        axes.text(1.03, place, f"{middle:.2f}", va="center", fontsize=9, weight="bold", color=shade)
    least = min(values[0] for values in found.values())
    names = [f"{'frames' if kind in frames else 'sound'}: {kind}" for kind in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlim=(min(0.0, math.floor(10 * least) / 10), 1.0))
    axes.set_xlabel("cosine of two tokens as they leave the encoders (1: the same direction)")
    axes.text(1.03, -0.62, "median", fontsize=8.5, color=FAINT)
    tidy(axes, grid="x")
    return Chart(
        name,
        made,
        f"Likeness of neighbouring tokens of {what}: medians "
        + "; ".join(f"{text} {found[kind][2]:.2f}" for text, kind in zip(names, rows, strict=True))
        + ".",
        f"{what}: bars from the lower to the upper quartile, hairs from 5 to 95 %, stroke: median. Grey: two clips "
        "that have nothing to do with each other, which is what redundancy has to exceed.",
    )


def kept_by(kept: Kept, name: str, what: str) -> Chart:
    """Share of the questions, in percent, that a key subset kept: by type, and by difficulty."""
    made = figure(7.2, 4.2)
    left, right = made.subplots(1, 2, width_ratios=(1.25, 1))
    for axes, rows, shade in ((left, kept.types, colour(0)), (right, kept.difficulty, colour(1))):
        _bars(axes, rows, shade, 100 * kept.share)
    right.set_title("by loss late in the run")
    left.set_title("by type")
    return Chart(
        name,
        made,
        "Share of the questions kept: "
        + "; ".join(f"{row.name} {100 * row.share:.0f} %" for row in (*kept.types, *kept.difficulty))
        + ".",
        f"{what}: which {100 * kept.share:.0f} % the paper's rule takes, from the epochs that kept a sample. Dashed: "
        "what every group would keep if the choice were blind.",
    )


def _bars(axes, rows: Sequence[Share], shade: str, blind: float) -> None:  # type: ignore[no-untyped-def]
    values = [100 * row.share for row in rows]
    axes.barh(range(len(rows)), values, height=0.66, color=shade)
    axes.axvline(blind, color=INK, linestyle="--", linewidth=1)
    for place, value in enumerate(values):
        axes.text(value, place, f" {value:.0f} %", va="center", fontsize=8.8)
    axes.set_yticks(range(len(rows)), [row.name.replace("/", " ") for row in rows], fontsize=8.8)
    axes.set(xlim=(0, 1.2 * max(*values, blind)), ylim=(len(rows) - 0.4, -0.6))
    axes.set_xlabel("kept, percent of the questions")
    tidy(axes, grid="x")
