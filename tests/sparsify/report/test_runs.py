"""Run folders: loaded, named after their configuration, grouped over seeds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsify.errors import CheckpointError
from sparsify.report.runs import group_runs, load_run, spread

Make = Callable[..., Path]
OFF = {"mask.keep": 1.0, "merge.enabled": False}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "masking + merging"),
        ({"dense": True}, "dense"),
        (OFF, "dense"),
        ({"merge.enabled": False}, "masking"),
        ({"mask.schedule": [0.25, 1.0]}, "masking + merging"),
        ({"mask.schedule": [1.0]}, "merging"),
        ({**OFF, "select.skip": 0.5}, "selection"),
        ({"select.skip": 0.5}, "masking + merging + selection"),
        ({"dense": True, "train.inputs": "blind"}, "dense, blind"),
        ({"train.inputs": "textonly"}, "masking + merging, questions alone"),
    ],
)
def test_a_run_is_named_after_what_it_switches_on(make_run: Make, changes: dict[str, Any], name: str) -> None:
    assert load_run(make_run("run", changes)).name == name


def test_a_subset_is_named_after_its_selector_or_its_file(make_run: Make, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text(json.dumps({"selector": "random", "seed": 3, "question_ids": []}))
    (tmp_path / "rows.json").write_text("[]")
    names = [
        load_run(make_run(name, {"dense": True, "select.subset": str(tmp_path / f"{name}.json")})).name
        for name in ("ids", "rows", "gone")
    ]
    assert names == ["dense, random subset", "dense, rows subset", "dense, gone subset"]


def test_seeds_are_one_group_and_dense_comes_first(make_run: Make) -> None:
    runs = [
        load_run(make_run(f"{name}-{seed}", changes | {"train.seed": seed}, accuracy=0.6 + seed / 100))
        for name, changes in (("sparse", {}), ("dense", {"dense": True}))
        for seed in (2, 0, 1)
    ]
    groups = group_runs(runs)
    assert [(g.name, [r.seed for r in g.runs], g.number) for g in groups] == [
        ("dense", [0, 1, 2], 0),
        ("masking + merging", [0, 1, 2], 1),
    ]
    assert groups[0].spread("accuracy") == pytest.approx((0.61, 0.6, 0.62, 3))
    assert groups[0].type_accuracy("Audio/Comparative") == pytest.approx((0.62, 0.61, 0.63, 3))


def test_runs_of_one_name_that_differ_in_more_are_told_apart(make_run: Make) -> None:
    runs = [load_run(make_run(f"run-{keep}", {"mask.keep": keep})) for keep in (0.5, 0.25)]
    assert [group.name for group in group_runs(runs)] == [
        "masking + merging (keep 0.5)",
        "masking + merging (keep 0.25)",
    ]


def test_a_name_given_by_the_user_groups_whatever_has_it(make_run: Make) -> None:
    runs = [load_run(make_run(f"run-{keep}", {"mask.keep": keep}), "mine") for keep in (0.5, 0.25)]
    assert [(group.name, len(group.runs)) for group in group_runs(runs)] == [("mine", 2)]


def test_an_unfinished_run_has_its_epochs_and_no_scores(make_run: Make) -> None:
    run = load_run(make_run("run", finished=False, epochs=(0.5, 0.6), seconds=40.0))
    assert run.results is None
    assert run.accuracy is None
    assert run.by_type() == {}
    assert run.train_seconds == 40.0
    assert [line["val_accuracy"] for line in run.history] == [0.5, 0.6]


def test_when_an_accuracy_was_reached(make_run: Make) -> None:
    run = load_run(make_run("run", epochs=(0.5, 0.6, 0.7), seconds=30.0))
    assert [run.seconds_to(value) for value in (0.5, 0.55, 0.7, 0.71)] == [10.0, 20.0, 30.0, None]


def test_videos_not_encoded_are_counted_where_results_do_not_say(make_run: Make) -> None:
    assert load_run(make_run("run", finished=False, videos_skipped=0.25)).not_encoded() == 0.25


def test_spread_leaves_out_what_is_unknown() -> None:
    assert spread([0.5, None, float("nan"), 0.7]) == pytest.approx((0.6, 0.5, 0.7, 2))
    assert spread([None]) is None


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, make_run: Make) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty: expected a run folder.*config.json and metrics.jsonl"):
        load_run(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="found no folder"):
        load_run(tmp_path / "none")
    broken = make_run("broken")
    (broken / "results.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"results.json: is not the results of a run"):
        load_run(broken)
    (broken / "results.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        load_run(broken)
