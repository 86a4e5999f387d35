"""The run folder: one process at a time, checkpoints whole or not at all, and clear errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sparsify.config import Config, TrainConfig
from sparsify.errors import CheckpointError, UsageError
from sparsify.training.checkpoints import recover, write_folder, write_text
from sparsify.training.metrics import MetricsLog, read_metrics
from sparsify.training.optim import build_optimizer
from sparsify.training.run import RunState, claim_run, lock_run, read_state, restore_optimizer, write_state

DEMO = Config.preset("demo")
HOLD_LOCK = """
import sys, time
from pathlib import Path
from sparsify.training.run import lock_run
with lock_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def encoder_parameters(self) -> list[nn.Parameter]:
        return list(self.encoder.parameters())


def stepped(net: Net) -> torch.optim.AdamW:
    optimizer = build_optimizer(net, TrainConfig(), torch.device("cpu"))
    net.head(net.encoder(torch.ones(5, 3))).square().sum().backward()
    optimizer.step()
    return optimizer


def holding_process(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_into_the_folder_is_refused_while_the_first_lives_and_not_after_it_was_killed(
    tmp_path: Path,
) -> None:
    process = holding_process(tmp_path)
    try:
        with (
            pytest.raises(UsageError, match=f"another run \\(process {process.pid}\\) is training into"),
            lock_run(tmp_path),
        ):
            pass
        process.kill()
        process.wait()
        assert (tmp_path / "run.lock").exists()
        with lock_run(tmp_path):
            assert (tmp_path / "run.lock").read_text() == f"{os.getpid()}\n"
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_the_lock_leaves_no_file_and_no_empty_folder(tmp_path: Path) -> None:
    with lock_run(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()
    with lock_run(tmp_path / "run"):
        (tmp_path / "run" / "kept").touch()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["kept"]


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(UsageError, match="expected a folder for the run, found a file"), lock_run(tmp_path / "run"):
        pass


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "last", "best", "results.json"])
def test_a_folder_that_holds_a_run_is_refused_unless_it_is_resumed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps(DEMO.to_dict()))
    with pytest.raises(UsageError, match=f"already holds a run \\({name}\\)"):
        claim_run(tmp_path, DEMO, resume=False)
    assert claim_run(tmp_path, DEMO, resume=True) == DEMO


def test_resume_takes_the_run_s_configuration_and_refuses_another(tmp_path: Path) -> None:
    write_text(tmp_path / "config.json", json.dumps(DEMO.to_dict()))
    assert claim_run(tmp_path, None, resume=True) == DEMO
    more = DEMO.replace(**{"train.workers": 3, "train.save_seconds": 60, "train.keep_last": 2})
    assert claim_run(tmp_path, more, resume=True) == more
    with pytest.raises(UsageError, match=r"the run to resume has train\.lr = 0\.001, now 0\.5 is asked for"):
        claim_run(tmp_path, DEMO.replace(**{"train.lr": 0.5}), resume=True)


def test_resume_without_a_configuration_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no run to resume: it has no config\.json"):
        claim_run(tmp_path, None, resume=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        claim_run(tmp_path, None, resume=True)


def test_a_checkpoint_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "last"
    write_folder(target, lambda folder: (folder / "a").write_text("old") and None)

    def fail(folder: Path) -> None:
        (folder / "a").write_text("new")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="last: cannot be written: No space left on device"):
        write_folder(target, fail)
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["last"]
    write_folder(target, lambda folder: (folder / "a").write_text("new") and None)
    assert (target / "a").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["last"]


def test_a_checkpoint_is_found_after_a_kill_at_any_moment_of_its_writing(tmp_path: Path) -> None:
    target, old, partial = tmp_path / "last", tmp_path / ".last.old", tmp_path / ".last.partial"
    assert not recover(target)
    old.mkdir()  # killed between the renames: the old one is whole, the new one has another name
    partial.mkdir()
    assert recover(target)
    assert not old.exists()
    old.mkdir()  # killed before the old one was removed
    assert recover(target)
    assert not old.exists()
    write_folder(target, lambda folder: (folder / "a").touch())  # over what a kill left behind
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last"]


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_before_or_between_the_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    target, done, rename = tmp_path / "last", [], os.rename
    write_folder(target, lambda folder: (folder / "a").write_text("old") and None)

    def killed(source: Path, destination: Path) -> None:
        if len(done) == renames:
            raise SystemExit
        done.append(1)
        rename(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(SystemExit):
            write_folder(target, lambda folder: (folder / "a").write_text("new") and None)
    assert recover(target)
    assert (target / "a").read_text() == "old"


def test_text_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "two\udc00")
    assert (tmp_path / "a").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_state_and_optimizer_come_back_as_they_were(tmp_path: Path) -> None:
    net, again = Net(), Net()
    optimizer = stepped(net)
    state = RunState(
        epoch=2, step=3, steps=9, loss_sum=0.1 + 0.2, best_epoch=1, best_accuracy=1 / 3, skipped={"v": "x"}
    )
    write_state(tmp_path, state, net, optimizer)
    assert read_state(tmp_path) == state
    other = build_optimizer(again, TrainConfig(), torch.device("cpu"))
    restore_optimizer(tmp_path, again, other)
    for ours, theirs in zip(net.parameters(), again.parameters(), strict=True):
        assert optimizer.state[ours].keys() == other.state[theirs].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in optimizer.state[ours].items():
            torch.testing.assert_close(other.state[theirs][key], value, rtol=0, atol=0)


def test_no_file_of_the_state_is_a_pickle(tmp_path: Path) -> None:
    net = Net()
    write_state(tmp_path, RunState(), net, stepped(net))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["optimizer.safetensors", "training.json"]


def test_an_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    net = Net()
    optimizer = stepped(net)
    save_file({"exp_avg/other.weight": torch.zeros(2)}, tmp_path / "optimizer.safetensors")
    with pytest.raises(
        CheckpointError, match=r"optimizer\.safetensors: holds 'other\.weight', which this model has not"
    ):
        restore_optimizer(tmp_path, net, optimizer)
    save_file({"exp_avg/head.bias": torch.zeros(3)}, tmp_path / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"exp_avg of 'head\.bias': expected shape \(2,\), got \(3,\)"):
        restore_optimizer(tmp_path, net, optimizer)
    (tmp_path / "optimizer.safetensors").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: cannot be read"):
        restore_optimizer(tmp_path, net, optimizer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "missing; this checkpoint cannot be resumed"),
        ("[", "not JSON"),
        ('{"version": 0}', "expected a training state of version 2"),
        ('{"version": 2, "epoch": 0}', "expected the keys best_accuracy, .* got epoch"),
    ],
)
def test_a_strange_training_state_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "training.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"training.json: {message}"):
        read_state(tmp_path)


def test_metrics_are_lines_and_tensorboard_scalars(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write("step", 10, {"loss": 1.5, "keep": 0.5})
    kept = log.length
    log.write("epoch", 12, {"val_accuracy": 0.25, "note": "text"})
    log.close()
    assert read_metrics(tmp_path) == [
        {"kind": "step", "step": 10, "loss": 1.5, "keep": 0.5},
        {"kind": "epoch", "step": 12, "val_accuracy": 0.25, "note": "text"},
    ]
    assert [line["step"] for line in read_metrics(tmp_path, "epoch")] == [12]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == ["epoch/val_accuracy", "step/keep", "step/loss"]
    assert [(e.step, e.value) for e in board.Scalars("step/loss")] == [(10, 1.5)]

    again = MetricsLog(tmp_path, keep=kept, first_step=10)  # resumed from a checkpoint before the second line
    again.write("step", 20, {"loss": 1.0})
    again.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20]
    MetricsLog(tmp_path / "elsewhere", enabled=False).close()
    assert not (tmp_path / "elsewhere").exists()
