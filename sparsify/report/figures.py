"""The charts that need nothing but runs: accuracy by type, key subsets, training time, validation over time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sparsify.data.templates import TYPES
from sparsify.report._charts import Chart, colour, end_labels, figure, hold_texts, mark, tidy, whisker, wrap
from sparsify.report._page import FAINT, INK
from sparsify.report.published import Published
from sparsify.report.runs import Group, Run, Spread, spread

__all__ = ["accuracy_over_time", "full_groups", "radar", "subsets", "training_time"]

GREY = "#8a929c"


def radar(groups: Sequence[Group], published: Sequence[Published] = (), name: str = "radar") -> Chart:
    """Accuracy in percent by question type, a polygon a group; the floor grey; published systems thin and dashed."""
    lines = 1 + len(groups) + sum(1 for row in published if row.types)
    made = figure(7.2, 5.6 + 0.21 * -(-lines // 2))
    axes = made.add_subplot(projection="polar")
    axes.set_theta_zero_location("N")  # type: ignore[attr-defined]
    axes.set_theta_direction(-1)  # type: ignore[attr-defined]
    kinds = [str(kind) for kind in TYPES]
    angles = [2 * math.pi * i / len(kinds) for i in range(len(kinds))]
    around = [*angles, angles[0]]
    floors = [_percent(spread(run.by_type()[kind]["floor"] for g in groups for run in g.runs)) for kind in kinds]
    axes.fill(around, [*floors, floors[0]], color="#eceef1", zorder=1)
    axes.plot(around, [*floors, floors[0]], color=GREY, linewidth=1, linestyle="--", label="floor", zorder=2)
    for place, row in enumerate(row for row in published if row.types):
        style = ((0, (1, 1.4)), (0, (4, 2)), (0, (4, 1.5, 1, 1.5)), (0, (7, 2)))[place % 4]
        shade = ("#7b8794", "#b08968", "#7a9e7e", "#a78bb5", "#8fa9c9", "#c98f8f", "#6b6b6b")[place % 7]
        axes.plot(
            around,
            [*row.types, row.types[0]],
            color=shade,
            linewidth=1,
            linestyle=style,
            label=f"{row.name} {row.overall:.2f} %",
            zorder=3,
        )
    for group in groups:
        values = [_percent(group.type_accuracy(kind)) for kind in kinds]
        shade, overall = colour(group.number), group.spread("accuracy")
        label = f"{group.name} {_percent(overall):.1f} %"
        axes.plot(
            around, [*values, values[0]], color=shade, marker=mark(group.number), ms=4, lw=1.6, label=label, zorder=4
        )
    axes.set_ylim(0, 100)
    axes.set_yticks([20, 40, 60, 80, 100], ["20", "40", "60", "80", "100 %"], color=FAINT, fontsize=8)
    axes.set_rlabel_position(20)  # type: ignore[attr-defined]
    axes.set_xticks(angles, [])
    for angle, kind in zip(angles, kinds, strict=True):
        side = "center" if abs(math.sin(angle)) < 0.4 else "left" if math.sin(angle) > 0 else "right"
        up = "bottom" if math.cos(angle) > 0.9 else "top" if math.cos(angle) < -0.8 else "center"
        axes.text(angle, 105, kind.replace("/", "\n"), ha=side, va=up, color=INK, fontsize=9)
    axes.grid(color="#dfe3e8", linewidth=0.7)
    axes.spines["polar"].set_color("#c8ced6")
    made.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9, handlelength=2.8, columnspacing=2.5)
    said = "; ".join(f"{g.name} {_percent(g.spread('accuracy')):.1f} % overall" for g in groups)
    return Chart(
        name,
        made,
        f"Radar chart of accuracy by the nine question types: {said}; the floor is the inner grey area.",
        "Accuracy on the judged split by question type, percent; means over seeds. Grey: the floor, what one gets "
        "from the question alone.",
    )


def full_groups(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """Those trained on all of the training split, and those on a key subset."""
    full = [group for group in groups if group.runs[0].subset is None and group.config.train.inputs == "both"]
    return full, [group for group in groups if group.runs[0].subset is not None]


def subsets(groups: Sequence[Group], name: str = "subsets") -> Chart:
    """Accuracy of runs on key subsets below that of the runs on everything, with the spread over seeds."""
    full, part = full_groups(groups)
    rows = [*full, *part]
    made = figure(7.2, 1.1 + 0.4 * len(full) + 0.56 * len(part))
    axes = made.add_subplot()
    most = max((_percent(group.spread("accuracy")) for group in full), default=None)
    largest = max((group.spread("train_questions") or Spread(0, 0, 0, 0)).mean for group in rows)
    names = []
    for place, group in enumerate(rows):
        found, size = group.spread("accuracy"), group.spread("train_questions")
        if found is None or size is None:
            continue
        part_of = f"\n{100 * size.mean / largest:.0f} % of the questions" if group in part else ""
        names.append(wrap(group.name, 30) + part_of)
        axes.barh(
            place,
            100 * found.mean,
            height=0.62,
            color=colour(group.number),
            hatch="" if group in full else "///",
            edgecolor="white",
            lw=0,
        )
        whisker(axes, place, 100 * found.low, 100 * found.high)
        share = f": {1e4 * found.mean / most:.0f} % of the best full run" if most and group in part else ""
        axes.text(100 * found.high + 1, place, f"{100 * found.mean:.1f} %{share}", va="center", fontsize=9)
    floors = spread(run.floor for group in rows for run in group.runs)
    if floors is not None:
        axes.axvline(100 * floors.mean, color=GREY, linestyle="--", linewidth=1)
        axes.text(100 * floors.mean, -0.62, f"floor {100 * floors.mean:.1f} %", color=FAINT, ha="center", fontsize=8.5)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlim=(0, 135), ylim=(len(rows) - 0.4, -0.6), xticks=range(0, 101, 20))
    axes.set_xlabel("accuracy on the judged split, percent")
    tidy(axes, grid="x")
    return Chart(
        name,
        made,
        "Bars of accuracy: " + "; ".join(f"{g.name} {_percent(g.spread('accuracy')):.1f} %" for g in rows) + ".",
        f"Accuracy of runs trained on a part of the training questions, beside runs trained on all. "
        f"Means; lines span the seeds{_counts(rows)}.",
    )


def training_time(groups: Sequence[Group]) -> Chart:
    """Seconds of training a group, as a share of the dense run's, with the share of videos not encoded."""
    timed = [group for group in groups if group.spread("train_seconds") is not None]
    dense = next((group for group in timed if group.config.dense), None)
    unit, scale = _time_unit(max(found.high for g in timed if (found := g.spread("train_seconds"))))
    made = figure(7.2, 1.1 + 0.52 * len(timed))
    axes = made.add_subplot()
    longest = 0.0
    for place, group in enumerate(timed):
        found = group.spread("train_seconds")
        assert found is not None
        longest = max(longest, found.high / scale)
        axes.barh(place, found.mean / scale, height=0.6, color=colour(group.number))
        whisker(axes, place, found.low / scale, found.high / scale)
        said = [f"{found.mean / scale:.1f} {unit}"]
        pairs = [] if dense is None or group is dense else [(run, _beside(dense, run)) for run in group.runs]
        if ratio := spread(run.train_seconds / base for run, (base, _) in pairs if run.train_seconds and base):
            said.append(f"{ratio.mean:.2f}x of dense")
        left_out = group.spread("not_encoded")
        if left_out is not None and group.config.select.skip > 0:
            said.append(f"{100 * left_out.mean:.0f} % of the videos not encoded")
        axes.text(
            found.high / scale,
            place,
            "  " + "\n  ".join([said[0], ", ".join(said[1:])]).rstrip(),
            va="center",
            fontsize=8.8,
            linespacing=1.25,
        )
        reached = spread(None if goal is None else run.seconds_to(goal) for run, (_, goal) in pairs)
        if reached is not None and reached.seeds == len(group.runs):
            axes.plot(reached.mean / scale, place, "D", ms=6.5, mfc="white", mec=INK, mew=1.1, zorder=5, gid="reached")
    axes.set_yticks(range(len(timed)), [wrap(group.name, 26) for group in timed])
    axes.set(xlim=(0, 1.55 * longest), ylim=(len(timed) - 0.45, -0.55))
    axes.set_xlabel(f"training time, {unit} (without decoding and evaluation)")
    tidy(axes, grid="x")
    hold_texts(axes)
    note = " Diamond: when validation reached what the dense run ends with, in every seed." if dense is not None else ""
    return Chart(
        "training_time",
        made,
        "Bars of training time: "
        + "; ".join(f"{g.name} {g.spread('train_seconds').mean / scale:.1f} {unit}" for g in timed)  # type: ignore[union-attr]
        + ".",
        f"Training time of a run, mean over seeds, shares of dense with the same seed; lines span the seeds"
        f"{_counts(timed)}.{note}",
    )


def accuracy_over_time(groups: Sequence[Group]) -> Chart:
    """Validation accuracy in percent after each epoch, over the time trained so far: seeds thin, means thick."""
    drawn = [group for group in groups if any(run.history for run in group.runs)]
    last = max(run.history[-1]["train_seconds"] for group in drawn for run in group.runs if run.history)
    unit, scale = _time_unit(last)
    made = figure(7.2, max(4.2, 1.0 + 0.42 * (len(drawn) + 1)))
    axes = made.add_subplot()
    labels = []
    low, high = 100.0, 0.0
    for group in drawn:
        curves = [
            (
                [line["train_seconds"] / scale for line in run.history],
                [100 * line["val_accuracy"] for line in run.history],
            )
            for run in group.runs
            if run.history
        ]
        epochs = min(len(times) for times, _ in curves)
        mean = [[math.fsum(c[i][e] for c in curves) / len(curves) for e in range(epochs)] for i in (0, 1)]
        shade = colour(group.number)
        if len(curves) > 1:
            for times, values in curves:
                axes.plot(times, values, color=shade, linewidth=0.8, alpha=0.45)
        axes.plot(*mean, color=shade, linewidth=2, marker=mark(group.number), markersize=5)
        labels.append((mean[0][-1], mean[1][-1], wrap(f"{group.name} {mean[1][-1]:.1f} %", 25), shade))
        low, high = min(low, *mean[1]), max(high, *mean[1])
    floors = spread(line["val_floor"] for group in drawn for run in group.runs for line in run.history[-1:])
    if floors is not None:
        axes.axhline(100 * floors.mean, color=GREY, linestyle="--", linewidth=1)
        labels.append((last / scale, 100 * floors.mean, f"floor {100 * floors.mean:.1f} %", FAINT))
        low, high = min(low, 100 * floors.mean), max(high, 100 * floors.mean)
    axes.set(xlim=(0, 1.02 * last / scale), ylim=(max(0, low - 5), min(100, high + 5)))
    end_labels(axes, labels, right=1.06 * last / scale)
    axes.set_xlabel(f"time trained, {unit}")
    axes.set_ylabel("accuracy on validation, percent")
    tidy(axes)
    return Chart(
        "accuracy_over_time",
        made,
        "Lines of validation accuracy over training time, ending at "
        + "; ".join(label[2].replace("\n", " ") for label in labels)
        + ".",
        "Validation accuracy after each epoch, over the time trained so far. Thin: seeds; thick: their mean.",
    )


def _beside(dense: Group, run: Run) -> tuple[float | None, float | None]:
    """Seconds of training and last validation accuracy of the dense run with ``run``'s seed; without one, means."""
    for other in dense.runs:
        if other.seed == run.seed:
            return other.train_seconds, other.accuracy_at_end
    means = dense.spread("train_seconds"), dense.spread("accuracy_at_end")
    return tuple(None if mean is None else mean.mean for mean in means)  # type: ignore[return-value]


def _percent(found: Spread | None) -> float:
    return math.nan if found is None else 100 * found.mean


def _counts(groups: Sequence[Group]) -> str:
    """How many seeds there are: " (3 each)", or nothing where it is one."""
    counts = {len(group.runs) for group in groups}
    if counts == {1}:
        return ""
    return f" ({counts.pop()} each)" if len(counts) == 1 else f" ({min(counts)} to {max(counts)})"


def _time_unit(seconds: float) -> tuple[str, float]:
    if seconds >= 3 * 3600:
        return "hours", 3600.0
    return ("minutes", 60.0) if seconds >= 180 else ("seconds", 1.0)
