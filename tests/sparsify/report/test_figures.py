"""Numbers in, numbers on the axes: what the charts' artists hold, not what their pixels look like."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparsify.report import figures, figures_cost, figures_probe
from sparsify.report.cost import Stage, Variant
from sparsify.report.kept import Kept, Share
from sparsify.report.published import UPDATED_V1, V1, edition_of
from sparsify.report.runs import Group, group_runs, load_run

Make = Callable[..., Path]


def groups(*folders: Path) -> list[Group]:
    return group_runs([load_run(folder) for folder in folders])


def texts(axes) -> list[str]:
    return [text.get_text().strip() for text in axes.texts]


def lines(axes, gid: str | None = None) -> list:
    return [line for line in axes.lines if line.get_gid() == gid or (gid is None and line.get_gid() is None)]


def test_radar_has_a_polygon_a_group_and_the_floor(make_run: Make) -> None:
    chart = figures.radar(
        groups(
            make_run("a", {"train.seed": 0}, accuracy=0.6),
            make_run("b", {"train.seed": 1}, accuracy=0.7),
            make_run("c", {"dense": True}, accuracy=0.5, floor=0.4),
        )
    )
    floor, dense, sparse = chart.figure.axes[0].lines
    assert list(floor.get_ydata()) == pytest.approx([40, 39, 38, 37, 36, 35, 34, 33, 32, 40])
    assert list(dense.get_ydata()) == pytest.approx([50, 51, 52, 53, 54, 55, 56, 57, 58, 50])
    assert list(sparse.get_ydata()) == pytest.approx([65, 66, 67, 68, 69, 70, 71, 72, 73, 65])
    assert list(dense.get_xdata())[:3] == pytest.approx([0, 2 * math.pi / 9, 4 * math.pi / 9])
    assert "dense 50.0 %" in chart.alt


def test_radar_shows_published_rows_when_told(make_run: Make) -> None:
    chart = figures.radar(groups(make_run("a")), V1)
    names = [text.get_text() for text in chart.figure.legends[0].get_texts()]
    assert names[:2] == ["floor", "AVST 71.59 %"]
    assert len(names) == 1 + len(V1) + 1
    assert list(chart.figure.axes[0].lines[1].get_ydata())[:2] == [77.78, 67.17]


@pytest.mark.parametrize(
    "row", [row for row in V1 if row.name in ("AVST", "TSPM", "QA-TIGER")], ids=lambda row: row.name
)
def test_published_accuracies_are_counts_of_the_updated_split(row) -> None:
    """A slip of a digit or of a column would be no whole number of right answers."""
    right = 0
    for percent, asked in zip(row.types, UPDATED_V1.values(), strict=True):
        correct = round(percent / 100 * asked)
        assert 100 * correct / asked == pytest.approx(percent, abs=0.0051)
        right += correct
    assert 100 * right / sum(UPDATED_V1.values()) == pytest.approx(row.overall, abs=0.0051)
    assert sum(UPDATED_V1.values()) == 9129


def test_the_updated_v1_split_is_known_by_its_counts(make_run: Make) -> None:
    real = load_run(make_run("real", asked=tuple(UPDATED_V1.values())))
    other = load_run(make_run("other", asked=(100,) * 9))
    assert edition_of(real.by_type(), real.fingerprint, None) == "v1"
    assert edition_of(other.by_type(), other.fingerprint, None) is None


@pytest.mark.parametrize(
    ("edition", "fingerprint", "scenes", "expected"),
    [
        ("MUSIC-AVQA v2.0", "0123456789ab", False, "v2.0"),
        ("MUSIC-AVQA v2.0", "0123456789ab", True, None),  # rendered by sparsify synth
        ("MUSIC-AVQA v2.0", "ba9876543210", False, None),  # not what judged the run
        ("MUSIC-AVQA v1 test, first release", "0123456789ab", False, None),  # published rows are of the update
        (None, "0123456789ab", False, None),
    ],
)
def test_another_release_is_known_by_the_file_that_judged_the_run(
    make_run: Make, tmp_path: Path, edition: str | None, fingerprint: str, scenes: bool, expected: str | None
) -> None:
    class Root:
        root = tmp_path

        def has(self, name: str) -> bool:
            return name == "test"

        def split(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(edition=edition, fingerprint=fingerprint)

    if scenes:
        (tmp_path / "scenes.jsonl").touch()
    run = load_run(make_run("run"))
    assert edition_of(run.by_type(), run.fingerprint, Root()) == expected


def test_subsets_are_bars_with_their_spread(make_run: Make, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"selector": "random", "seed": 0}))
    subset = {"select.subset": str(tmp_path / "r.json")}
    chart = figures.subsets(
        groups(
            make_run("full", accuracy=0.8, questions=4000),
            make_run("a", subset | {"train.seed": 0}, accuracy=0.62, questions=1000),
            make_run("b", subset | {"train.seed": 1}, accuracy=0.66, questions=1000),
        )
    )
    axes = chart.figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([80, 64])
    (whisker,) = lines(axes, "whisker")
    assert list(whisker.get_xdata()) == pytest.approx([62, 66])
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "masking + merging",
        "masking + merging,\nrandom subset\n25 % of the questions",
    ]
    assert "64.0 %: 80 % of the best full run" in texts(axes)


def test_training_time_is_a_share_of_dense(make_run: Make) -> None:
    chart = figures.training_time(
        groups(
            make_run("dense", {"dense": True}, seconds=600.0, epochs=(0.5, 0.9, 0.7)),  # overfits
            make_run("sparse", {"select.skip": 0.5}, seconds=240.0, epochs=(0.5, 0.7, 0.8), videos_skipped=0.3),
        )
    )
    axes = chart.figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([10.0, 4.0])
    assert axes.get_xlabel().startswith("training time, minutes")
    assert texts(axes) == ["10.0 minutes", "4.0 minutes\n  0.40x of dense, 30 % of the videos not encoded"]
    (reached,) = lines(axes, "reached")
    assert list(reached.get_xdata()) == pytest.approx([160 / 60])  # the second of three epochs


def test_times_are_held_against_dense_with_the_same_seed(make_run: Make) -> None:
    chart = figures.training_time(
        groups(
            make_run("d0", {"dense": True, "train.seed": 0}, seconds=600.0, epochs=(0.5, 0.7)),
            make_run("d1", {"dense": True, "train.seed": 1}, seconds=400.0, epochs=(0.4, 0.6)),
            make_run("a", {"select.skip": 0.5, "train.seed": 0}, seconds=300.0, epochs=(0.7, 0.8)),
            make_run("b", {"select.skip": 0.5, "train.seed": 1}, seconds=120.0, epochs=(0.5, 0.6)),
        )
    )
    axes = chart.figure.axes[0]
    assert "0.40x of dense" in texts(axes)[1]  # (300 / 600 + 120 / 400) / 2, not 420 / 1000
    (reached,) = lines(axes, "reached")
    assert list(reached.get_xdata()) == pytest.approx([(150 + 120) / 2 / 60])  # 0.70 after 150 s, 0.60 after 120 s


def test_no_diamond_where_a_seed_never_reaches_what_dense_ends_with(make_run: Make) -> None:
    chart = figures.training_time(
        groups(
            make_run("dense", {"dense": True}, epochs=(0.5, 0.7)),
            make_run("a", {"select.skip": 0.5, "train.seed": 0}, epochs=(0.5, 0.8)),
            make_run("b", {"select.skip": 0.5, "train.seed": 1}, epochs=(0.5, 0.6)),
        )
    )
    assert lines(chart.figure.axes[0], "reached") == []


def test_what_is_said_of_a_training_time_is_not_cut_off(make_run: Make) -> None:
    """The longest remark stands at the longest bar."""
    runs = [
        make_run("dense", {"dense": True}, seconds=600.0, epochs=(0.5, 0.6)),
        make_run("questions", {"select.skip": 0.5}, seconds=660.0, epochs=(0.5, 0.7), videos_skipped=0.3),
    ]
    chart = figures.training_time(groups(*runs))
    (axes,) = chart.figure.axes
    chart.figure.draw_without_rendering()
    assert all(text.get_window_extent().x1 <= axes.bbox.x1 + 1 for text in axes.texts)
    assert axes.get_xlim()[1] < 40  # bars of 10 and 11 minutes still fill a good part


def test_accuracy_over_time_is_the_history(make_run: Make) -> None:
    chart = figures.accuracy_over_time(
        groups(
            make_run("a", {"train.seed": 0}, epochs=(0.5, 0.6), seconds=120.0),
            make_run("b", {"train.seed": 1}, epochs=(0.6, 0.8), seconds=140.0),
        )
    )
    axes = chart.figure.axes[0]
    first, second, mean, floor = lines(axes)
    assert list(first.get_xdata()) == [60, 120]
    assert list(first.get_ydata()) == pytest.approx([50, 60])
    assert list(second.get_xdata()) == [70, 140]
    assert list(second.get_ydata()) == pytest.approx([60, 80])
    assert list(mean.get_xdata()) == [65, 130]
    assert list(mean.get_ydata()) == pytest.approx([55, 70])
    assert list(floor.get_ydata()) == pytest.approx([40, 40])
    assert axes.get_xlabel() == "time trained, seconds"


def test_labels_at_the_ends_of_lines_do_not_touch(make_run: Make) -> None:
    runs = [make_run(f"run-{i}", {"mask.keep": 0.5 + i / 100}, epochs=(0.5, 0.7 + i / 1000)) for i in range(7)]
    chart = figures.accuracy_over_time(groups(*runs))
    chart.figure.canvas.draw()
    boxes = sorted((text.get_window_extent() for text in chart.figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 8
    assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))


def test_cost_by_stage() -> None:
    variants = [
        Variant("dense", (Stage("frames", 64, 3_000_000), Stage("sound", 16, 1_000_000))),
        Variant("masked", (Stage("frames", 32, 1_500_000), Stage("sound", 8, 500_000))),
    ]
    chart = figures_cost.by_stage(variants, "demo")
    tokens, work = chart.figure.axes
    assert [bar.get_width() for bar in tokens.patches] == [64, 16, 32, 8]
    assert [bar.get_width() for bar in work.patches] == [3, 1, 1.5, 0.5]
    assert work.get_xlabel() == "MFLOP a video"
    assert "masked: 2 MFLOP (50 %)" in chart.alt


def test_accuracy_against_keep_and_fence(make_run: Make) -> None:
    (group,) = groups(make_run("a"))
    points = [(1.0, 0.7, 20.0), (0.25, 0.5, 5.0), (0.5, 0.6, 10.0)]
    keep = figures_probe.accuracy_against("keep", [(group, points)], 0.4).figure.axes[0]
    assert list(keep.lines[0].get_xdata()) == [25, 50, 100]
    assert list(keep.lines[0].get_ydata()) == pytest.approx([50, 60, 70])
    assert list(keep.lines[1].get_ydata()) == pytest.approx([40, 40])
    fence = figures_probe.accuracy_against("fence", [(group, points)], None).figure.axes[0]
    assert list(fence.lines[0].get_xdata()) == [0.25, 0.5, 1.0]
    assert [t for t in texts(fence) if t.isdecimal()] == ["5", "10", "20"]


def test_a_floor_above_the_curve_is_on_the_axes(make_run: Make) -> None:
    (group,) = groups(make_run("a", epochs=(0.2, 0.3), floor=0.66))
    asked = figures_probe.accuracy_against("keep", [(group, [(1.0, 0.5, 12.0), (0.5, 0.5, 6.0)])], 0.66)
    assert asked.figure.axes[0].get_ylim()[1] > 66
    assert figures.accuracy_over_time([group]).figure.axes[0].get_ylim()[1] > 66


def test_likeness_shows_percentiles() -> None:
    found = {
        "next frame, same place": [0.1, 0.4, 0.8, 0.9, 0.99],
        "another clip, same moment": [0.0, 0.1, 0.2, 0.3, 0.4],
    }
    axes = figures_probe.likeness(found, "likeness", "a run").figure.axes[0]
    assert [bar.get_x() for bar in axes.patches] == pytest.approx([0.4, 0.1])
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.5, 0.2])
    assert [line.get_xdata()[0] for line in lines(axes, "median")] == [0.8, 0.2]
    assert [list(line.get_xdata()) for line in lines(axes)] == [[0.1, 0.99], [0.0, 0.4]]


def test_what_a_subset_kept() -> None:
    kept = Kept("video", (Share("Audio/Counting", 10, 5),), (), (Share("easiest fifth", 4, 1),), 0.25)
    left, right = figures_probe.kept_by(kept, "kept", "a run").figure.axes
    assert [bar.get_width() for bar in left.patches] == [50]
    assert [bar.get_width() for bar in right.patches] == [25]
    assert list(left.lines[0].get_xdata()) == [25, 25]
