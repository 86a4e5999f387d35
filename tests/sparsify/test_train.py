"""Training end to end on twelve tiny clips: learning, determinism, stopping and going on, refusals, what is written."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sparsify
from sparsify.config import Config
from sparsify.data.music_avqa import DataRoot
from sparsify.errors import CheckpointError, TrainingError
from sparsify.model import SparsifyModel
from sparsify.model.fusion import AnswerHead
from sparsify.training import InterruptedRun, evaluate, read_metrics
from sparsify.training import trainer as trainer_module
from sparsify.training.loading import epoch_order, share, step_seed
from sparsify.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("_silent_model")
ORDER = [1, 4, 0, 2, 7, 6, 5, 3]
STEP_SEED = 5259706952898591335
STEPS = 3  # an epoch of 8 videos, 3 a step
Run = Callable[..., dict[str, Any]]


def same_weights(a: Path, b: Path) -> bool:
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def test_the_order_of_an_epoch_is_literal_and_differs_between_epochs_and_seeds() -> None:
    assert epoch_order(8, seed=0, epoch=0) == ORDER
    assert sorted(epoch_order(100, 3, 1)) == list(range(100))
    assert len({tuple(epoch_order(100, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert step_seed(0, 0, 0) == STEP_SEED
    assert len({step_seed(s, t, r) for s in range(3) for t in range(3) for r in range(3)}) == 27


def test_the_shares_of_the_processes_are_the_step() -> None:
    assert [share([7, 1, 5, 2, 9], rank, 2) for rank in range(2)] == [[7, 5, 9], [1, 2]]
    assert [share([7], rank, 2) for rank in range(2)] == [[7], []]


def test_the_loss_falls_and_the_clips_are_learnt(run: Run, tiny_config: Config, tmp_path: Path) -> None:
    results = run(config=tiny_config.replace(**{"train.epochs": 16, "text.dropout": 0.0, "fusion.dropout": 0.0}))
    losses = [line["loss"] for line in results["history"]]
    assert losses[0] > 3  # log(42) = 3.7
    assert losses[-1] < 0.5
    assert results["best"]["val_accuracy"] >= 5 / 6
    assert results["evaluation"]["unmasked"]["accuracy"] >= 5 / 6


def test_the_run_folder_and_its_results(run: Run, tiny_config: Config, tiny_root: DataRoot, tmp_path: Path) -> None:
    results = run()
    folder = tmp_path / "run"
    assert sorted(p.name for p in folder.iterdir()) == [
        "best", "config.json", "last", "metrics.jsonl", "predictions.json", "results.json", "tensorboard",
    ]  # fmt: skip
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert Config.from_dict(json.loads((folder / "config.json").read_text())) == tiny_config
    assert results["splits"]["train"] == {
        "file": "avqa-train.json",
        "fingerprint": tiny_root.split("train").fingerprint,
        "videos": 8,
        "questions": 24,
        "skipped": {},
    }
    assert results["inputs"] == "both"
    assert results["precision"] == {"name": "fp32", "reason": "as configured"}
    assert results["judged"] == "test"
    assert {name: found["keep"] for name, found in results["evaluation"].items()} == {"unmasked": 1.0, "masked": 0.5}
    assert results["evaluation"]["unmasked"]["scored"] == results["evaluation"]["unmasked"]["asked"] == 6
    assert results["steps"] == 9
    assert results["parameters"] == sum(p.numel() for p in SparsifyModel.from_pretrained(folder / "best").parameters())
    assert results["seconds"]["total"] == pytest.approx(
        sum(results["seconds"][k] for k in ("prepare", "train", "evaluate", "save"))
    )
    assert results["versions"]["torch"] == torch.__version__.partition("+")[0] or "+" in results["versions"]["torch"]
    if (Path(sparsify.__file__).parents[1] / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", results["versions"]["commit"])
    again = evaluate(SparsifyModel.from_pretrained(folder / "best"), tiny_root, "test", precision="fp32")
    assert again.accuracy == results["evaluation"]["unmasked"]["accuracy"]
    written = json.loads((folder / "predictions.json").read_text())
    assert [(row["question_id"], row["answer"]) for row in written] == [p[:1] + p[2:3] for p in again.predictions]


def test_every_logged_step_and_epoch_is_a_line(run: Run, tiny_config: Config, tmp_path: Path) -> None:
    run()
    steps, epochs = read_metrics(tmp_path / "run", "step"), read_metrics(tmp_path / "run", "epoch")
    assert [line["step"] for line in steps] == [3, 6, 9]  # the last step of each epoch
    assert [line["step"] for line in epochs] == [3, 6, 9]
    assert set(steps[0]) == {
        "kind", "step", "epoch", "loss", "lr", "encoder_lr", "grad_norm", "keep", "units", "questions_per_s",
        "videos_per_s", "seconds",
    }  # fmt: skip
    assert [line["keep"] for line in steps] == [0.5, 0.5, 1.0]
    assert [line["units"] for line in steps] == [24, 24, 48]  # two frames and a segment of 16 units
    # Step 2 of 3 in epoch 0, of 3 epochs: the middle of the last step is 2.5/9 of the run, 0.05 of it warm-up.
    assert steps[0]["lr"] == pytest.approx(3e-3 * 0.8640, rel=1e-3)
    assert [line["questions"] for line in epochs] == [24, 24, 24]
    for line in epochs:
        assert 0 < line["super_tokens"] <= 24
        assert 0 <= line["val_accuracy"] <= 1


def test_two_runs_with_one_seed_are_one_run_and_with_two_are_two(run: Run, tiny_config: Config, tmp_path: Path) -> None:
    run("a")
    run("b")
    assert same_weights(tmp_path / "a" / "last", tmp_path / "b" / "last")
    run("c", config=tiny_config.replace(**{"train.seed": 1}))
    assert not same_weights(tmp_path / "a" / "last", tmp_path / "c" / "last")


def test_workers_change_nothing(run: Run, tiny_config: Config, tmp_path: Path) -> None:
    run("a", stop_after=None)
    run("b", config=tiny_config.replace(**{"train.workers": 1}))
    assert same_weights(tmp_path / "a" / "last", tmp_path / "b" / "last")


@pytest.mark.parametrize("stop", [1, STEPS, STEPS + 2])
def test_a_run_stopped_anywhere_and_resumed_ends_in_the_same_weights_and_losses(
    run: Run, tmp_path: Path, stop: int
) -> None:
    """After a step, after the last step of an epoch (not evaluated yet), in the middle of the second."""
    whole = run("whole")
    with pytest.raises(InterruptedRun, match=f"stopped in epoch .* saved in {tmp_path / 'cut' / 'last'}; .* --resume"):
        run("cut", stop_after=stop)
    assert not (tmp_path / "cut" / "results.json").exists()
    assert not (tmp_path / "cut" / "run.lock").exists()
    with pytest.raises(InterruptedRun):
        run("cut", resume=True, config=None, stop_after=1)
    cut = run("cut", resume=True)
    assert same_weights(tmp_path / "whole" / "last", tmp_path / "cut" / "last")
    assert same_weights(tmp_path / "whole" / "best", tmp_path / "cut" / "best")
    exact = ("epoch", "loss", "val_loss", "val_accuracy", "keep", "super_tokens", "questions")
    assert [[line[k] for k in exact] for line in cut["history"]] == [
        [line[k] for k in exact] for line in whole["history"]
    ]
    assert [line["step"] for line in read_metrics(tmp_path / "cut", "epoch")] == [3, 6, 9]


def test_a_complete_run_resumed_returns_its_results(run: Run) -> None:
    results = run()
    assert run(resume=True) == json.loads(json.dumps(results))


def test_what_was_measured_after_the_checkpoint_is_dropped_when_the_run_resumes(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        run(stop_after=STEPS + 1)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:  # a killed process went on after its last save
        file.write('{"kind": "step", "step": 5}\n{"kind": "st')
    run(resume=True)
    assert [line["step"] for line in read_metrics(tmp_path / "run", "step")] == [3, 4, 6, 9]


def test_resume_before_anything_was_saved_starts_from_the_beginning(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", killed)
        with pytest.raises(SystemError):
            run("cut")
    assert not (tmp_path / "cut" / "last").exists()
    run("cut", resume=True)
    run("whole")
    assert same_weights(tmp_path / "whole" / "last", tmp_path / "cut" / "last")


def killed(*args: object, **options: object) -> None:
    raise SystemError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_leaves_the_handlers_as_they_were(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(number)
    take_step = Trainer.take_step

    def interrupted(self: Trainer, *args: Any, **options: Any) -> None:
        if self.taken == 1:
            os.kill(os.getpid(), number)
        take_step(self, *args, **options)

    monkeypatch.setattr(Trainer, "take_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped in epoch 1 after 2 steps"):
        run(progress=True)
    assert "the same command with --resume goes on from there" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    assert json.loads((tmp_path / "run" / "last" / "training.json").read_text())["step"] == 2


def test_a_signal_during_the_evaluation_saves_too(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validate = Trainer.validate

    def interrupted(self: Trainer) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return validate(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "validate", interrupted)
        with pytest.raises(InterruptedRun, match="stopped after the steps of epoch 1"):
            run("cut")
    run("cut", resume=True)
    run("whole")
    assert same_weights(tmp_path / "whole" / "last", tmp_path / "cut" / "last")


def test_a_save_within_the_epoch_is_a_checkpoint_to_resume(
    run: Run, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    save_last = Trainer.save_last
    monkeypatch.setattr(Trainer, "save_last", lambda self: (saved.append(self.state.step), save_last(self)))
    run(config=tiny_config.replace(**{"train.save_seconds": 0.0}))
    assert saved == [1, 2, 3, 0] * 3
    steps = read_metrics(tmp_path / "run", "step")
    assert [line["step"] for line in steps] == list(range(1, 10))


def test_the_best_checkpoint_is_the_earliest_of_the_best_on_validation(
    run: Run, tiny_config: Config, tiny_root: DataRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy = {0: 0.25, 1: 0.5, 2: 0.5, 3: 0.1}
    validate = Trainer.validate
    weights: dict[int, torch.Tensor] = {}

    class Judged:
        def __init__(self, result: Any, accuracy: float) -> None:
            self.result, self.accuracy = result, accuracy

        def __getattr__(self, name: str) -> Any:
            return getattr(self.result, name)

    def scripted(self: Trainer) -> Any:
        weights[self.state.epoch] = next(self.model.parameters()).detach().clone()
        return Judged(validate(self), accuracy[self.state.epoch])

    monkeypatch.setattr(Trainer, "validate", scripted)
    results = run(config=tiny_config.replace(**{"train.epochs": 4}))
    assert results["best"] == {"epoch": 1, "val_accuracy": 0.5}
    best = SparsifyModel.from_pretrained(tmp_path / "run" / "best")
    assert torch.equal(next(best.parameters()), weights[1])
    judged = evaluate(best, tiny_root, "test", precision="fp32")
    assert results["evaluation"]["unmasked"]["loss"] == pytest.approx(judged.loss, rel=1e-6)
    last = evaluate(SparsifyModel.from_pretrained(tmp_path / "run" / "last"), tiny_root, "test", precision="fp32")
    assert abs(last.loss - judged.loss) > 1e-4


def test_the_epoch_is_judged_on_validation_never_on_test(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = []
    evaluate_dataset = trainer_module.evaluate_dataset

    def spy(model: Any, dataset: Any, split: Any, **options: Any) -> Any:
        judged.append(split.name)
        return evaluate_dataset(model, dataset, split, **options)

    monkeypatch.setattr(trainer_module, "evaluate_dataset", spy)
    run()
    assert judged == ["val"] * 3


def test_a_loss_that_is_not_a_number_names_step_and_videos_and_keeps_the_checkpoint(
    run: Run, tiny_root: DataRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = AnswerHead.forward
    calls = []

    def poisoned(self: AnswerHead, *args: Any) -> torch.Tensor:
        calls.extend([1] if self.training else [])
        return forward(self, *args) * (float("nan") if len(calls) == STEPS + 2 else 1.0)

    monkeypatch.setattr(AnswerHead, "forward", poisoned)
    names = list(tiny_root.split("train").videos)
    expected = ", ".join(names[i] for i in epoch_order(8, 0, 1)[3:6])
    with pytest.raises(
        TrainingError, match=rf"diverged in epoch 2, step 2: loss nan, .*; videos {expected}; earlier .*last"
    ):
        run()
    weights = load_file(tmp_path / "run" / "last" / "model.safetensors")
    assert all(w.isfinite().all() for w in weights.values() if w.is_floating_point())
    assert json.loads((tmp_path / "run" / "last" / "training.json").read_text())["epoch"] == 1
    assert not (tmp_path / "run" / "run.lock").exists()


def test_init_starts_from_a_checkpoint_s_weights(run: Run, tiny_config: Config, tmp_path: Path) -> None:
    run("first")
    still = tiny_config.replace(**{"train.epochs": 1, "train.lr": 0.0, "train.encoder_lr": 0.0, "merge.fence": 1.5})
    run("second", config=still, init=tmp_path / "first" / "best")
    assert same_weights(tmp_path / "first" / "best", tmp_path / "second" / "last")
    with pytest.raises(CheckpointError, match="does not fit the configured model"):
        run("third", config=tiny_config.replace(**{"fusion.dim": 48}), init=tmp_path / "first" / "best")


def test_a_dense_run_masks_nothing_and_a_split_without_test_is_judged_on_validation(
    run: Run, tiny_config: Config, tiny_root: DataRoot, tmp_path: Path
) -> None:
    tiny_root.annotation_path("test").unlink()
    results = run(config=tiny_config.replace(**{"dense": True, "train.epochs": 1, "train.inputs": "deaf"}))
    assert list(results["evaluation"]) == ["unmasked"]
    assert results["judged"] == "val"
    assert results["inputs"] == "deaf"
    assert read_metrics(tmp_path / "run", "step")[0]["keep"] == 1.0


def test_the_configuration_is_printed_once(run: Run, tiny_config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    run(progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count(json.dumps(tiny_config.to_dict())) == 1
    assert "fp32: as configured" in shown.err
    assert "epoch 3/3: 8/8 in" in shown.err
    assert "masked (" not in shown.err.splitlines()[0]
    assert "unmasked" in shown.err
    assert "Audio-Visual" in shown.err  # the table


def test_the_matching_is_trained_beside_the_answers(run: Run, tiny_config: Config, tmp_path: Path) -> None:
    """The loss that is reported stays that of the answers: the matching starts at log(3), of three videos a step."""
    one = tiny_config.replace(**{"train.epochs": 1, "text.dropout": 0.0, "fusion.dropout": 0.0})
    plain = run("plain", config=one)["history"][0]["loss"]
    beside = run("matched", config=one.replace(**{"train.matching": 1.0}))["history"][0]["loss"]
    assert beside != plain
    assert abs(beside - plain) < 0.5
    matched = SparsifyModel.from_pretrained(tmp_path / "matched" / "last")
    assert matched.matching is not None
    assert matched.matching.scale.item() != 10.0
