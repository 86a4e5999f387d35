"""``sparsify select`` and ``train --subset``: from a run to the files of its key subset to a run on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsify.cli import main
from sparsify.cli import select as select_command
from sparsify.config import Config
from sparsify.data.music_avqa import DataRoot, read_split
from sparsify.data.subset import to_row
from sparsify.errors import DataError, UsageError
from sparsify.training.selectors import SELECTORS

pytestmark = pytest.mark.usefixtures("_silent_model")
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def config(tiny_config: Config) -> Config:
    return tiny_config.replace(**{"train.epochs": 4, "select.skip": 0.5})


def test_the_two_files_of_a_subset_train_alike(
    run: Run, config: Config, tiny_root: DataRoot, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config=config)
    capsys.readouterr()
    assert main(["select", str(tmp_path / "run"), "--size", "50%", "--unit", "video"]) == 0
    ids = tmp_path / "run" / "subset-paper-video-4.json"
    rows = tmp_path / "run" / "subset-paper-video-4-avqa.json"
    assert capsys.readouterr().out == (
        f"12 questions about 4 videos, chosen by 4 epochs of {tmp_path / 'run'}\n"
        f"ids: {ids}\nin MUSIC-AVQA's own form: {rows}\n"
    )
    document = json.loads(ids.read_text())
    assert {key: document[key] for key in ("selector", "unit", "size", "epochs", "fingerprint")} == {
        "selector": "paper", "unit": "video", "size": 4, "epochs": 4,
        "fingerprint": tiny_root.split("train").fingerprint,
    }  # fmt: skip
    assert [q.id for q in read_split(rows).questions] == document["question_ids"]
    results = [
        run(name, config=config.replace(**{"select.subset": str(path), "train.epochs": 1}))
        for name, path in (("ids", ids), ("rows", rows))
    ]
    for result, path in zip(results, (ids, rows), strict=True):
        train = result["splits"]["train"]
        assert (train["file"], train["videos"], train["questions"]) == (path.name, 4, 12)
    assert results[0]["history"][0]["loss"] == results[1]["history"][0]["loss"]
    assert results[0]["splits"]["train"]["fingerprint"] == results[1]["splits"]["train"]["fingerprint"]


def test_a_subset_of_a_subset_is_of_the_same_annotation_file(run: Run, config: Config, tmp_path: Path) -> None:
    run(config=config)
    half, quarter = tmp_path / "half.json", tmp_path / "quarter.json"
    assert main(["select", str(tmp_path / "run"), "--size", "12", "--output", str(half)]) == 0
    run("half", config=config.replace(**{"select.subset": str(half)}))
    arguments = ["--size", "25%", "--selector", "random", "--seed", "3", "--output", str(quarter)]
    assert main(["select", str(tmp_path / "half"), *arguments]) == 0
    ids = json.loads(quarter.read_text())["question_ids"]
    assert len(ids) == 3
    assert set(ids) < set(json.loads(half.read_text())["question_ids"])
    result = run("quarter", config=config.replace(**{"select.subset": str(quarter), "train.epochs": 1}))
    assert result["history"][0]["questions"] == 3


def test_a_run_is_not_judged_by_what_it_trained_on(
    run: Run, config: Config, tiny_root: DataRoot, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leaked = tiny_root.split("test").questions[0]
    path = tmp_path / "part.json"
    path.write_text(json.dumps([to_row(q) for q in (*tiny_root.split("train").questions[:6], leaked)]))
    one = config.replace(**{"select.subset": str(path), "train.epochs": 1})
    with pytest.raises(DataError, match=rf"such as {leaked.id}, are of the split 'test', .*; --filter-leaks"):
        run("refused", config=one)
    assert not (tmp_path / "refused").exists()
    result = run("filtered", config=one.replace(**{"select.filter_leaks": True}), progress=True)
    assert result["splits"]["train"]["questions"] == 6
    assert "left out 1 questions of the split 'test'" in capsys.readouterr().err


def test_a_resumed_run_keeps_to_its_subset(run: Run, config: Config, tiny_root: DataRoot, tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    path.write_text(json.dumps([to_row(q) for q in tiny_root.split("train").questions[:9]]))
    with pytest.raises(KeyboardInterrupt):
        run(config=config.replace(**{"select.subset": str(path)}), stop_after=1)
    with pytest.raises(UsageError, match=r"the run to resume has select\.subset = '.*part\.json', now None"):
        run(config=config, resume=True)
    assert run(config=None, resume=True)["splits"]["train"]["questions"] == 9


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--size", "0"], 2, "expected a whole number above 0, or a share such as 25%, got '0'"),
        (["--size", "120%"], 2, "got '120%'"),
        (["--size", "nan%"], 2, "got 'nan%'"),
        (
            ["--size", "9", "--unit", "video", "--selector", "random"],
            2,
            "--size 9: the run has 8 videos to choose from",
        ),
        (["--size", "1"], 2, "skipped nothing, so all of its samples rank alike; train it with --skip 0.5"),
        (["--size", "1", "--unit", "frame"], 2, "--unit: expected question or video, got 'frame'"),
        (
            ["--size", "1", "--selector", "best"],
            2,
            "--selector: expected paper, random, robust or stratified, got 'best'",
        ),
        (["--size", "1", "--output", "no/where.json"], 2, "--output no/where.json: the folder no does not exist"),
    ],
)
def test_what_cannot_be_selected_is_said_in_one_line(
    run: Run, tiny_config: Config, tmp_path: Path, arguments: list[str], code: int, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run(config=tiny_config.replace(**{"train.epochs": 1}))
    capsys.readouterr()
    assert main(["select", str(tmp_path / "run"), *arguments]) == code
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not list((tmp_path / "run").glob("subset*"))


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["select", str(tmp_path), "--size", "1"]) == 5
    assert "expected a run folder of `sparsify train`, with last/ in it" in capsys.readouterr().err


def test_the_subset_is_looked_for_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path), "--subset", str(tmp_path / "none.json")]) == 2
    assert "argument --subset: expected a file, found nothing" in capsys.readouterr().err


def test_the_names_of_the_command_are_those_of_the_selectors() -> None:
    assert tuple(SELECTORS) == select_command.SELECTORS
