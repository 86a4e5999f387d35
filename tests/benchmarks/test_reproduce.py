"""The comparison's arithmetic on numbers made by hand, and its commands in the order in which they need each other."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def reproduce() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "reproduce.py"
    spec = importlib.util.spec_from_file_location("benchmarks_reproduce", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_constant_difference_has_an_interval_of_no_width(reproduce):
    ours, base = {1: True, 2: True, 3: False}, {1: True, 2: False, 3: False}
    mean, low, high = reproduce.bootstrap([(ours, base)] * 3)
    assert mean == pytest.approx(100 / 3)
    assert low <= mean <= high
    same = reproduce.bootstrap([(base, base)])
    assert same == (0.0, 0.0, 0.0)


def test_the_interval_is_that_of_seeds_too(reproduce):
    """Seeds 10 points apart: of two drawn anew, both are the worse one in a quarter of the cases."""
    base = dict.fromkeys(range(1000), False)
    better = {i: i < 100 for i in base}
    mean, low, high = reproduce.bootstrap([(better, base), (base, base)])
    assert mean == pytest.approx(5)
    assert low == 0
    assert high == pytest.approx(10, abs=2.5)


def test_the_interval_is_that_of_paired_questions(reproduce):
    """Of 1,000 questions 60 change for the better, 40 for the worse: 2 points, +- 1.96 * sqrt(0.0996 / 1000)."""
    base = {i: i % 2 == 0 for i in range(1000)}
    flips = [i for i in base if not base[i]][:60] + [i for i in base if base[i]][:40]
    ours = base | {i: not base[i] for i in flips}
    mean, low, high = reproduce.bootstrap([(ours, base)])
    assert mean == pytest.approx(2.0, abs=1e-4)
    assert low == pytest.approx(2.0 - 1.96, abs=0.25)
    assert high == pytest.approx(2.0 + 1.96, abs=0.25)


def write_run(folder: Path, *, seconds: float, history: list[tuple[float, float]], right: list[bool]) -> None:
    folder.mkdir(parents=True)
    results = {
        "seconds": {"train": seconds, "evaluate": 18.0, "save": 2.0},
        "history": [{"train_seconds": s, "val_accuracy": a} for s, a in history],
        "evaluation": {"unmasked": {"accuracy": sum(right) / len(right)}},
        "selection": {"videos_skipped": 0.25},
    }
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    answers = [{"question_id": i, "correct": ok} for i, ok in enumerate(right)]
    (folder / "predictions.json").write_text(json.dumps(answers), encoding="utf-8")


def test_a_row_against_dense(reproduce, tmp_path):
    paths = reproduce.Paths(tmp_path / "data", tmp_path)
    dense, everything = (next(row for row in reproduce.ROWS if row.name == name) for name in ("dense", "all"))
    write_run(paths.run(dense, 0), seconds=100.0, history=[(50, 0.4), (100, 0.6)], right=[True, False])
    write_run(paths.run(everything, 0), seconds=40.0, history=[(20, 0.6), (40, 0.7)], right=[True, True])
    base, ours = reproduce.outcomes([dense, everything], [0], paths)
    assert (base.time, base.time_to_dense, base.difference) == (1.0, 1.0, (0.0, 0.0, 0.0))
    assert (ours.time, ours.whole, ours.time_to_dense, ours.not_encoded) == (0.4, 60 / 120, 0.2, 0.25)
    assert ours.difference[0] == 50.0
    table = reproduce.render([base, ours], [0], ungrouped=400.0)
    assert "| all | 100.0 (100.0 to 100.0) | +50.0 (" in table
    assert "| 0.40 | 0.50 | 0.100 | 0.20 | 25% |" in table


def test_a_row_that_never_reaches_dense_says_so(reproduce, tmp_path):
    paths = reproduce.Paths(tmp_path / "data", tmp_path)
    for row, accuracy in ((reproduce.ROWS[0], 0.6), (reproduce.ROWS[1], 0.5)):
        write_run(paths.run(row, 0), seconds=10.0, history=[(10, accuracy)], right=[True])
    found = list(reproduce.outcomes(reproduce.ROWS[:2], [0], paths))
    assert found[1].time_to_dense is None
    assert "| never |" in reproduce.render(found, [0], ungrouped=10.0)


def test_subsets_come_from_the_run_with_everything_on_and_done_work_is_not_done_again(reproduce, tmp_path, monkeypatch):
    called: list[tuple[str, ...]] = []

    def sparsify(*arguments, jobs=1):
        called.append(tuple(map(str, arguments)))
        if arguments[0] == "train":
            write_run(Path(arguments[3]), seconds=1.0, history=[(1, 0.5)], right=[True])
            write_config(Path(arguments[3]), arguments)
        else:
            Path(arguments[-1]).parent.mkdir(parents=True, exist_ok=True)
            Path(arguments[-1]).write_text("[]", encoding="utf-8")

    monkeypatch.setattr(reproduce, "sparsify", sparsify)
    paths = reproduce.Paths(tmp_path / "data", tmp_path / "runs")
    row = next(row for row in reproduce.ROWS if row.selector == "paper")
    reproduce.train(row, 1, paths)
    assert [call[0] for call in called] == ["select", "train"]
    assert called[0][1] == str(tmp_path / "runs" / "all-1")
    subset = str(tmp_path / "runs" / "subset-paper-1.json")
    assert ("--set", f'select.subset="{subset}"') == called[1][-2:]
    assert "train.seed=1" in called[1]
    assert "--resume" not in called[1]
    reproduce.train(row, 1, paths)
    assert len(called) == 2


def write_config(run: Path, arguments: Sequence[object]) -> None:
    from sparsify.config import Config

    options = [str(value) for flag, value in pairwise(arguments) if flag == "--set"]
    config = Config.preset("demo").with_options(options)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")


@pytest.mark.parametrize("which", ["row", "ungrouped"])
def test_a_run_that_was_stopped_goes_on_and_one_of_another_setting_is_refused(reproduce, tmp_path, monkeypatch, which):
    called: list[tuple[str, ...]] = []
    monkeypatch.setattr(reproduce, "sparsify", lambda *arguments, jobs=1: called.append(tuple(map(str, arguments))))
    monkeypatch.setattr(reproduce, "_ungroup", lambda source, root: None)
    paths = reproduce.Paths(tmp_path / "data", tmp_path / "runs")
    row = reproduce.ROWS[0]

    def again() -> None:
        if which == "row":
            reproduce.train(row, 0, paths)
        else:
            with contextlib.suppress(FileNotFoundError):  # no run, so no results
                reproduce.ungrouped_seconds(paths)

    again()
    run = Path(called[0][3])
    write_config(run, called[0])
    again()
    assert "--resume" not in called[0]
    assert "--resume" in called[1]
    assert "--set" not in called[1]
    write_config(run, [*called[0], "--set", "train.lr=0.5"])
    with pytest.raises(SystemExit, match=r"was trained with train = .*: remove it, or choose another --output"):
        again()
    assert len(called) == 2


def test_each_question_gets_a_video_of_its_own(reproduce, tmp_path):
    source, root = tmp_path / "data", tmp_path / "each"
    (source / "annotations").mkdir(parents=True)
    (source / "videos").mkdir()
    for name in ("a", "b"):
        (source / "videos" / f"{name}.mp4").write_text(name, encoding="utf-8")
    rows = [{"video_id": "a", "question_id": 1}, {"video_id": "a", "question_id": 2}]
    (source / "annotations" / "avqa-train.json").write_text(json.dumps(rows), encoding="utf-8")
    (source / "annotations" / "avqa-val.json").write_text('[{"video_id": "b", "question_id": 3}]', encoding="utf-8")
    reproduce._ungroup(source, root)
    train = json.loads((root / "annotations" / "avqa-train.json").read_text(encoding="utf-8"))
    assert [row["video_id"] for row in train] == ["a-1", "a-2"]
    assert sorted(p.name for p in (root / "videos").iterdir()) == ["a-1.mp4", "a-2.mp4", "b.mp4"]
    assert (root / "videos" / "a-2.mp4").read_text(encoding="utf-8") == "a"


def test_every_row_is_a_configuration(reproduce):
    from sparsify.config import Config

    assert [row.selector for row in reproduce.ROWS if row.selector] == ["random", "paper", "robust"]
    paper = next(row for row in reproduce.ROWS if row.name == "paper's schedule")
    paper = Config.preset("demo").with_options([*reproduce.SETTING, *paper.options])
    assert (paper.select.unit, paper.select.skip) == ("question", 0.5)
    assert [paper.keep_at(epoch) for epoch in range(5)] == [0.5, 0.5, 0.5, 1, 1]
    for row in (*reproduce.ROWS, *reproduce.BESIDE):
        config = Config.preset("demo").with_options([*reproduce.SETTING, *row.options])
        assert config.dense == (row.name == "dense")
        masked = {config.keep_at(epoch) for epoch in range(config.train.epochs)}
        assert (0.5 in masked) == (row.name not in ("dense", "merging", "selection"))


def test_rows_beside_are_made_when_asked_for_alone(reproduce):
    assert reproduce.chosen(None) == list(reproduce.ROWS)
    assert [row.name for row in reproduce.chosen(["stratified subset"])] == ["dense", "stratified subset"]
    every = (*reproduce.ROWS, *reproduce.BESIDE)
    assert len({row.name for row in every}) == len(every)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("all", 0.5, 1.0),
        ("all, half throughout", 0.5, 0.5),
        ("all, questions skipped, half throughout", 0.5, 0.5),
        ("all, rising ratios", 0.25, 0.5),
        ("all, rising ratios, last epoch whole", 0.25, 1.0),
    ],
)
def test_schedules_of_ratios(reproduce, name, first, last):
    from sparsify.config import Config

    row = next(row for row in (*reproduce.ROWS, *reproduce.BESIDE) if row.name == name)
    config = Config.preset("demo").with_options([*reproduce.SETTING, *row.options])
    assert [config.keep_at(epoch) for epoch in (0, 2, 3, 13, 14)] == [first, first, 0.5, 0.5, last]


def test_every_number_of_every_run_is_written_down(reproduce, tmp_path):
    paths = reproduce.Paths(tmp_path / "data", tmp_path)
    row = reproduce.ROWS[1]
    for seed, accuracy in ((0, 0.5), (1, 0.75)):
        write_run(paths.run(row, seed), seconds=30.0, history=[(10, 0.4), (30, 0.6)], right=[True, False])
        file = paths.run(row, seed) / "results.json"
        results = json.loads(file.read_text(encoding="utf-8"))
        types = {"Audio/Counting": {"accuracy": accuracy, "floor": 0.25}}
        scores = {"types": types, "overall": {"accuracy": accuracy / 2, "floor": 0.125}}
        results["evaluation"] = {"unmasked": {"accuracy": accuracy, "scores": scores}, "masked": {"accuracy": 0.25}}
        results["history"] = [{"videos": 8}, {"videos": 5}]
        results["selection"] |= {"questions_skipped": 0.5}
        results |= {"best": {"epoch": 1, "val_accuracy": 0.6}, "steps": 4, "precision": {"name": "fp32"}}
        results["machine"] = {"name": "a CPU", "cores": 2, "threads": 1, "device": "cpu"}
        results["versions"] = {"torch": "2.13.0", "commit": "0123456789ab"}
        results["splits"] = {
            "train": {"questions": 8, "videos": 4, "fingerprint": "beef"},
            "test": {"questions": 2, "videos": 1, "fingerprint": "f00d"},
        }
        file.write_text(json.dumps(results), encoding="utf-8")
    runs = reproduce.every_run([row], [0, 1], paths).splitlines()
    assert runs[2] == "| masking | 0 | 50.00 | 25.00 | 2 | 60.00 | 30 | 18 | 2.0 | 4 | 13 | 25%, 50% |"
    assert runs[3].startswith("| masking | 1 | 75.00 | 25.00 |")
    assert reproduce.by_type([row], [0, 1], paths).splitlines() == [
        "| | floor | masking |",
        "|---|---|---|",
        "| Audio/Counting | 25.0 | 62.5 |",
        "| overall | 12.5 | 31.2 |",
    ]
    origin = reproduce.provenance([paths.run(row, 0), paths.run(row, 1)])
    assert "masking-1" not in origin
    for part in (
        "0123456789ab",
        "a CPU, 2 cores, 1 thread(s) a run on cpu",
        "fp32",
        "test 2 questions on 1 videos (f00d)",
    ):
        assert part in origin
    file = paths.run(row, 1) / "results.json"
    file.write_text(file.read_text(encoding="utf-8").replace("0123456789ab", "ba9876543210"), encoding="utf-8")
    first, second = reproduce.provenance([paths.run(row, 0), paths.run(row, 1)]).splitlines()
    assert first.startswith("- masking-0: Commit 0123456789ab; ")
    assert second.startswith("- masking-1: Commit ba9876543210; ")
    assert second.endswith("Trained on 8 questions on 4 videos (beef), subsets on a quarter of it.")


def test_runs_at_once_begin_in_order_and_the_first_failure_ends_them(reproduce):
    begun: list[int] = []
    together = threading.Barrier(2, timeout=10)

    def task(number: int) -> None:
        begun.append(number)
        together.wait()  # passes only where two run at a time
        if number == 2:
            raise SystemExit(3)

    reproduce.at_once([partial(task, 0), partial(task, 1)], 2)
    assert sorted(begun) == [0, 1]
    with pytest.raises(SystemExit):
        reproduce.at_once([partial(task, 2), partial(task, 2), *(partial(begun.append, 9) for _ in range(5))], 2)
    assert 9 not in begun


def test_each_of_several_runs_has_its_share_of_the_cores(reproduce, monkeypatch):
    seen: list[str | None] = []

    def run(command, check, env):
        seen.append(env.get("OMP_NUM_THREADS"))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(reproduce.subprocess, "run", run)
    monkeypatch.setattr(reproduce, "cores", lambda: 6)
    for jobs in (1, 2, 8):
        reproduce.sparsify("info", jobs=jobs)
    assert seen == [None, "3", "1"]
