"""Checkpoints: sealed, checked before they are read, kept at the ends of epochs; a damaged one is passed over."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from sparsify.cli._run import checkpoint_folder
from sparsify.config import Config
from sparsify.data.music_avqa import DataRoot
from sparsify.errors import CheckpointError
from sparsify.model import SparsifyModel
from sparsify.report.runs import load_run
from sparsify.seal import check_seal
from sparsify.training import InterruptedRun
from sparsify.training import trainer as trainer_module
from sparsify.training.checkpoints import keep_epoch, resumable, tidy, write_folder
from sparsify.training.loading import start_loading
from sparsify.training.selectors import read_records
from sparsify.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("_silent_model")
Run = Callable[..., dict[str, Any]]


def filled(folder: Path, text: str = "abc") -> Path:
    def fill(partial: Path) -> None:
        (partial / "model").write_text(text)
        (partial / "state").write_text("{}")

    write_folder(folder, fill)
    return folder


def test_the_seal_is_size_and_digest_of_every_file(tmp_path: Path) -> None:
    folder = filled(tmp_path / "last")
    assert json.loads((folder / "manifest.json").read_text()) == {
        "version": 1,
        "files": {
            "model": {"bytes": 3, "blake2b": "cf4ab791c62b8d2b2109c90275287816"},
            "state": {"bytes": 2, "blake2b": "2afb9b83f9314e5d029766197f539792"},
        },
    }
    check_seal(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "model").write_text("abd"),
            r"last/model: is not what was written \(BLAKE2b .*, expected cf4ab791",
        ),
        (lambda f: (f / "model").write_text("ab"), "last/model: has 2 bytes, was written with 3"),
        (lambda f: (f / "state").unlink(), "last/state: missing; this checkpoint is not whole"),
        (lambda f: (f / "manifest.json").unlink(), r"last/manifest\.json: missing; this checkpoint is not whole"),
        (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json: expected the sizes and digests"),
        (lambda f: (f / "manifest.json").write_text('{"files": [1]}'), r"manifest\.json: expected the sizes"),
    ],
)
def test_what_is_not_as_it_was_written_is_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = filled(tmp_path / "last")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        check_seal(folder)


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (FULL, None),
        (SafetensorError(FULL.strerror), None),
        (CheckpointError("model: full"), FULL),
        (CheckpointError(FULL.strerror), None),
    ],
)
def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path: Path, error: Exception, cause: OSError | None) -> None:
    folder = filled(tmp_path / "last")

    def fail(partial: Path) -> None:
        (partial / "model").write_text("x")
        raise error from cause

    with pytest.raises(
        CheckpointError, match="last: cannot be written: No space left on device; what was there is untou"
    ):
        write_folder(folder, fail)
    check_seal(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["last"]


def test_the_ends_of_the_last_epochs_are_kept_and_stay_as_they_were(tmp_path: Path) -> None:
    for epoch in range(4):
        filled(tmp_path / "last", text=f"epoch {epoch}")
        keep_epoch(tmp_path, epoch, count=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch-003", "epoch-004", "last"]
    for folder, text in (("epoch-003", "epoch 2"), ("epoch-004", "epoch 3")):
        check_seal(tmp_path / folder)
        assert (tmp_path / folder / "model").read_text() == text
    keep_epoch(tmp_path, 4, count=0)
    assert not (tmp_path / "epoch-005").exists()


def test_the_newest_whole_checkpoint_is_resumed_from(tmp_path: Path) -> None:
    assert resumable(tmp_path) == (None, "")
    for epoch in (8, 9, 10):
        filled(tmp_path / "last", text=str(epoch))
        keep_epoch(tmp_path, epoch, count=2)
    assert resumable(tmp_path) == (tmp_path / "last", "")
    (tmp_path / "last" / "state").unlink()
    folder, wrong = resumable(tmp_path)
    assert folder == tmp_path / "epoch-011"
    assert wrong == f"{tmp_path / 'last' / 'state'}: missing; this checkpoint is not whole"
    (tmp_path / "epoch-011" / "model").unlink()
    assert resumable(tmp_path)[0] == tmp_path / "epoch-010"
    (tmp_path / "epoch-010" / "model").unlink()
    with pytest.raises(CheckpointError, match="last/state: missing"):
        resumable(tmp_path)


def test_checkpoints_of_epochs_are_told_apart_by_number(tmp_path: Path) -> None:
    for epoch in (998, 999, 1000):
        filled(tmp_path / "last", text=str(epoch))
        keep_epoch(tmp_path, epoch, count=2)
    assert sorted(path.name for path in tmp_path.glob("epoch-*")) == ["epoch-1000", "epoch-1001"]
    (tmp_path / "last" / "state").unlink()
    assert resumable(tmp_path)[0] == tmp_path / "epoch-1001"


def test_between_two_names_the_earlier_checkpoint_is_found(run: Run, tmp_path: Path) -> None:
    """A kill may come after the one has left its name and before the next one has it."""
    run()
    folder = tmp_path / "run"
    for name in ("best", "last"):
        (folder / name).rename(folder / f".{name}.old")
    assert checkpoint_folder(folder) == folder / ".best.old"
    assert load_run(folder).best == folder / ".best.old"
    assert read_records(folder, "video").epochs == 3


def test_a_checkpoint_that_changed_is_not_loaded(run: Run, tmp_path: Path) -> None:
    run()
    path = tmp_path / "run" / "best" / "model.safetensors"
    SparsifyModel.from_pretrained(path.parent)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"best/model\.safetensors: is not what was written"):
        SparsifyModel.from_pretrained(path.parent)


def test_what_kills_left_is_tidied(tmp_path: Path) -> None:
    (tmp_path / ".last.partial").mkdir()
    (tmp_path / ".config.json.7.partial").touch()
    filled(tmp_path / "best").rename(tmp_path / ".best.old")
    tidy(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_a_damaged_checkpoint_is_said_and_the_run_goes_on_from_the_epoch_before(
    run: Run, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config.replace(**{"train.keep_last": 2, "select.skip": 0.5, "train.epochs": 4})
    run("whole", config=config)
    with pytest.raises(InterruptedRun):
        run("cut", config=config, stop_after=7)
    path = tmp_path / "cut" / "last" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    run("cut", config=config, resume=True, progress=True)
    said = capsys.readouterr().err
    assert f"{path}: is not what was written" in said
    assert f"going on from {tmp_path / 'cut' / 'epoch-002'}" in said
    for name in ("last/model.safetensors", "last/selection.safetensors", "best/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_a_kill_between_the_save_and_the_keeping_of_an_epoch_costs_nothing(
    run: Run, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config.replace(**{"train.keep_last": 1})

    def killed(folder: Path, epoch: int, count: int) -> None:
        if epoch == 2:
            raise SystemExit
        keep_epoch(folder, epoch, count)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "keep_epoch", killed)
        with pytest.raises(SystemExit):
            run(config=config)
    assert (tmp_path / "run" / "epoch-002").exists()
    run(config=config, resume=True)
    assert [path.name for path in (tmp_path / "run").glob("epoch-*")] == ["epoch-003"]
    check_seal(tmp_path / "run" / "epoch-003")


def test_a_damaged_only_checkpoint_ends_the_resumed_run(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        run(stop_after=1)
    with (tmp_path / "run" / "last" / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match=r"last/model\.safetensors: has .* bytes, was written with"):
        run(resume=True)


def test_a_video_that_breaks_after_the_start_leaves_the_order_of_a_resumed_run_as_it_was(
    run: Run, tiny_config: Config, tiny_root: DataRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its questions are missing from the epochs that follow, and counted; the other videos come in the same steps."""
    take_step = Trainer.take_step
    steps: list[tuple[str, ...]] = []

    def spy(self: Trainer, loaded: Any, *args: Any, **options: Any) -> None:
        steps.append(loaded.batch.video_id)
        take_step(self, loaded, *args, **options)

    monkeypatch.setattr(Trainer, "take_step", spy)
    run("whole")
    whole, steps = steps, []
    with pytest.raises(InterruptedRun):
        run("cut", stop_after=3)
    broken = "00000004"
    path = tiny_root.video_path(broken)
    path.unlink()
    path.write_bytes(b"")
    results = run("cut", resume=True)
    assert steps == [*whole[:3], *(tuple(v for v in step if v != broken) for step in whole[3:])]
    assert list(results["splits"]["train"]["skipped"]) == [broken]
    assert [line["questions"] for line in results["history"]] == [24, 21, 21]


LIMITED = """
import json, resource, sys
from pathlib import Path
from sparsify.config import Config
from sparsify.data.music_avqa import DataRoot
from sparsify.training import train
from sparsify.training.trainer import Trainer

config, root, output, cache, until = sys.argv[1:]
take_step = Trainer.take_step

def limited(self, *args, **options):
    take_step(self, *args, **options)
    full = 2 <= self.state.steps < int(until)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200 if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY))

Trainer.take_step = limited
train(Config.from_dict(json.loads(config)), DataRoot(root), output, cache_folder=cache)
"""


@pytest.mark.parametrize(("until", "code"), [("3", 0), ("99", 1)])
def test_a_disk_that_is_full_for_a_while_costs_a_save_and_at_the_end_of_an_epoch_the_run(
    run: Run, tiny_config: Config, tiny_root: DataRoot, cache_folder: Path, tmp_path: Path, until: str, code: int
) -> None:
    """A limit on the size of files stands in for the disk: writing fails inside safetensors as it would there."""
    config = tiny_config.replace(**{"train.save_seconds": 0.0, "train.epochs": 2})
    run("whole", config=config)
    arguments = [json.dumps(config.to_dict()), str(tiny_root.root), str(tmp_path / "run"), str(cache_folder), until]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == code, done.stderr
    assert "run/last: cannot be written: File too large; what was there is untouched; training goes on" in done.stderr
    assert done.stderr.count("metrics.jsonl: cannot be written: File too large; its lines wait for room") == 1
    check_seal(tmp_path / "run" / "last")
    if code:
        assert "CheckpointError" in done.stderr
        assert json.loads((tmp_path / "run" / "last" / "training.json").read_text())["steps"] == 1
    else:
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        assert [line["saves_failed"] for line in results["history"]] == [1, 1]
    run("run", config=config, resume=True)
    ours, theirs = (tmp_path / name / "last" / "model.safetensors" for name in ("whole", "run"))
    assert ours.read_bytes() == theirs.read_bytes()


FORKS = """
import os, sys, time
from pathlib import Path
from sparsify.training.run import leave_locks, lock_run
with lock_run(Path(sys.argv[1])):
    if os.fork() == 0:
        leave_locks()
        print("forked", flush=True)
        time.sleep(30)
    time.sleep(30)
"""


def test_a_loading_process_whose_parent_died_before_it_began_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "fork")
    start_loading(0, parent=os.getppid())
    with pytest.raises(SystemExit):
        start_loading(0, parent=os.getpid())


def test_a_loading_process_that_outlives_a_killed_run_does_not_hold_its_lock(tmp_path: Path) -> None:
    from sparsify.training.run import lock_run

    process = subprocess.Popen(
        [sys.executable, "-c", FORKS, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "forked\n"
        process.kill()
        process.wait()
        begun = time.monotonic()
        with lock_run(tmp_path):
            assert time.monotonic() - begun < 1.0
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
