"""Runs that cannot start or go on, or whose data is broken: what they say, and that they leave things as they were."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsify.config import Config
from sparsify.data.dataset import VideoDataset
from sparsify.data.music_avqa import DataRoot
from sparsify.errors import CheckpointError, DataError, MediaError, TrainingError, UsageError
from sparsify.training import InterruptedRun, train
from sparsify.training.metrics import MetricsLog, read_metrics
from sparsify.training.trainer import Trainer

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


def test_a_dead_loading_process_ends_the_run_which_goes_on_when_resumed(
    run: Run, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps until then are saved, though it was not time to save."""
    config = tiny_config.replace(**{"train.workers": 1, "train.save_seconds": 900.0})
    take_step = Trainer.take_step

    def interrupted(self: Trainer, *args: Any, **options: Any) -> None:
        take_step(self, *args, **options)
        if self.taken == 2:
            (worker,) = multiprocessing.active_children()
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", interrupted)
        with pytest.raises(
            TrainingError, match=r"a data loading process died .* in epoch 1 after 2 steps: .*saved in .*last"
        ):
            run("cut", config=config)
    assert json.loads((tmp_path / "cut" / "last" / "training.json").read_text())["step"] == 2
    run("cut", config=config, resume=True)
    run("whole", config=config)
    ours, theirs = (tmp_path / name / "last" / "model.safetensors" for name in ("whole", "cut"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_another_runtime_error_is_not_taken_for_a_dead_process(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Trainer, *args: Any, **options: Any) -> None:
        raise RuntimeError("of another kind")

    monkeypatch.setattr(Trainer, "take_step", fail)
    with pytest.raises(RuntimeError, match="of another kind"):
        run()


def test_a_video_that_breaks_while_the_run_goes_is_said_once_and_counted(
    run: Run, tiny_root: DataRoot, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = VideoDataset._clip

    def read(self: VideoDataset, path: Path) -> Any:
        if path.stem == "00000005":
            raise MediaError(f"{path}: broken")
        return clip(self, path)

    monkeypatch.setattr(VideoDataset, "_clip", read)
    results = run(progress=True)
    assert capsys.readouterr().err.count("skipped 00000005: ") == 1
    for line in results["history"]:
        assert (line["questions"], line["videos"], line["videos_unreadable"]) == (21, 7, 1)


class FullBoard:
    """TensorBoard's writer once its thread has met a full disk, without that thread, whose end no test can wait for."""

    def add_scalar(self, *_: object) -> None:
        raise OSError(errno.EFBIG, "File too large")

    close = add_scalar


def test_metrics_that_cannot_be_written_are_said(tmp_path: Path) -> None:
    """And written when there is room again. A limit on the size of files stands in for the disk."""
    log = MetricsLog(tmp_path)
    log.write("step", 1, {})
    log._board.close()
    log._board = FullBoard()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, before[1]))
    try:
        said = log.write("step", 2, {"loss": 1.5})
        assert said.endswith("metrics.jsonl: cannot be written: File too large; its lines wait for room")
        assert log.write("step", 3, {}) == "", "once is enough"
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: cannot be written: File too large"):
            _ = log.length
        assert [line["step"] for line in read_metrics(tmp_path)] == [1], "no half a line"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for step in range(4, 40):
        assert log.write("step", step, {"loss": 1.5}) == ""
    assert log.length == (tmp_path / "metrics.jsonl").stat().st_size
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 40))


def test_metrics_that_a_full_disk_cut_are_whole_again_in_a_resumed_run(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write("step", 1, {})
    kept = log.length
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')
    again = MetricsLog(tmp_path, keep=kept, first_step=1)
    again.write("step", 2, {})
    again.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
