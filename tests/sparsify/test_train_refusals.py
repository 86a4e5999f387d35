"""Runs that cannot start, or whose data is broken: what they say, and that they leave things as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsify.config import Config
from sparsify.data.music_avqa import DataRoot
from sparsify.errors import DataError, UsageError
from sparsify.training import InterruptedRun, train

pytestmark = pytest.mark.usefixtures("_silent_model")
Run = Callable[..., dict[str, Any]]


def test_a_folder_that_holds_a_run_is_refused_and_untouched(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        run(stop_after=1)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match="already holds a run"):
        run()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_run_that_cannot_start_leaves_no_folder(run: Run, tiny_root: DataRoot, tmp_path: Path) -> None:
    (tiny_root.root / "annotations" / "avqa-val.json").unlink()
    with pytest.raises(DataError, match=r"avqa-val\.json: no such annotation file"):
        run()
    assert not (tmp_path / "run").exists()


def test_resume_refuses_other_data(run: Run, tiny_root: DataRoot, tiny_config: Config, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        run(stop_after=1)
    path = tiny_root.annotation_path("train")
    path.write_text(json.dumps(json.loads(path.read_text())[:-1]))
    with pytest.raises(UsageError, match=r"avqa-train\.json: fingerprint \w+, but the run to resume used"):
        train(tiny_config, DataRoot(tiny_root.root), tmp_path / "run", resume=True, progress=False)


def test_broken_videos_are_skipped_and_counted(run: Run, tiny_root: DataRoot, tmp_path: Path) -> None:
    broken = {name: next(iter(tiny_root.split(name).videos)) for name in ("train", "val", "test")}
    for video in broken.values():
        path = tiny_root.video_path(video)
        path.unlink()
        path.write_bytes(b"")
    results = run(progress=False)
    for name, video in broken.items():
        assert list(results["splits"][name]["skipped"]) == [video]
    assert [line["questions"] for line in results["history"]] == [21, 21, 21]
    assert (results["evaluation"]["unmasked"]["scored"], results["evaluation"]["unmasked"]["asked"]) == (3, 6)


def test_without_a_readable_training_video_the_run_says_why(run: Run, tiny_root: DataRoot, tmp_path: Path) -> None:
    for video in tiny_root.split("train").videos:
        tiny_root.video_path(video).unlink()
    with pytest.raises(DataError, match=r"avqa-train\.json: none of the 8 videos can be read \(.*00000000"):
        run()
