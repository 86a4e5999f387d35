"""Selection within training: what a run asks and skips, how it weighs, counts and reports that, and going on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file

from sparsify.config import Config
from sparsify.data.music_avqa import DataRoot
from sparsify.training import InterruptedRun, read_metrics
from sparsify.training.selection import Selection
from sparsify.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("_silent_model")
Run = Callable[..., dict[str, Any]]
EPOCHS = 5  # 4.375 of them skip: 1, 2 and 3
WHOLE = [0, 4]
EXACT = ("epoch", "loss", "val_loss", "val_accuracy", "questions", "questions_skipped", "videos", "videos_skipped")


@pytest.fixture(params=["video", "question"])
def config(request: pytest.FixtureRequest, tiny_config: Config) -> Config:
    return tiny_config.replace(**{"train.epochs": EPOCHS, "select.skip": 0.5, "select.unit": request.param})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, tuple[int, ...]]]:
    """Every step of the runs to come: its epoch, its number of videos, the ids of its questions."""
    steps: list[tuple[int, int, tuple[int, ...]]] = []
    take_step = Trainer.take_step

    def spy(self: Trainer, loaded: Any, *args: Any, **options: Any) -> None:
        steps.append((self.state.epoch, len(loaded.batch.video_id), tuple(loaded.batch.question_id.tolist())))
        take_step(self, loaded, *args, **options)

    monkeypatch.setattr(Trainer, "take_step", spy)
    return steps


def test_what_is_skipped_is_neither_asked_nor_encoded_and_all_of_it_is_counted(
    run: Run, config: Config, tiny_root: DataRoot, tmp_path: Path, asked: list[tuple[int, int, tuple[int, ...]]]
) -> None:
    results = run(config=config)
    by_video = config.select.unit == "video"
    saved = load_file(tmp_path / "run" / "last" / "selection.safetensors")
    for epoch, line in enumerate(read_metrics(tmp_path / "run", "epoch")):
        steps = [step for step in asked if step[0] == epoch]
        ids = sorted(i for _, _, questions in steps for i in questions)
        assert ids == saved["question_id"][saved["kept"][epoch][saved["sample"]]].tolist()
        assert len(set(ids)) == len(ids) == line["questions"] == 24 - line["questions_skipped"]
        encoded = sum(videos for _, videos, _ in steps)
        assert encoded == len({i // 3 for i in ids}) == line["videos"] == 8 - line["videos_skipped"]
        assert all(videos == 3 for _, videos, _ in steps[:-1])
        if epoch in WHOLE:
            assert len(ids) == 24
        else:
            assert 0 < line["questions_skipped"] < 24
            assert not by_video or line["questions_skipped"] == 3 * line["videos_skipped"] > 0
    assert saved["losses"].isfinite().all()
    skipped = sum(line["questions_skipped"] for line in results["history"])
    assert results["selection"]["questions_skipped"] == skipped / (24 * EPOCHS)
    assert results["selection"] | {"questions_skipped": 0, "videos_skipped": 0} == {
        "unit": config.select.unit, "skip": 0.5, "questions_skipped": 0, "videos_skipped": 0,
    }  # fmt: skip


def test_a_step_s_loss_is_the_weighted_sum_over_the_nominal_number_of_questions(
    run: Run, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three questions a video, three videos a step: nine, in the short last step of an epoch, too."""
    objectives: list[float] = []
    expected: list[float] = []
    weights: list[set[float]] = []
    backward, record = accelerate.Accelerator.backward, Selection.record

    def spy_backward(self: Any, objective: torch.Tensor, **options: Any) -> None:
        objectives.append(objective.item())
        backward(self, objective, **options)

    def spy_record(self: Selection, places: torch.Tensor, losses: torch.Tensor, questions: Any) -> None:
        w = self.weight[places]
        weights.append(set(w.tolist()))
        expected.append(sum(x * y for x, y in zip(w.tolist(), losses.tolist(), strict=True)) / 9)
        record(self, places, losses, questions)

    monkeypatch.setattr(accelerate.Accelerator, "backward", spy_backward)
    monkeypatch.setattr(Selection, "record", spy_record)
    run(config=config)
    assert objectives == pytest.approx(expected, rel=1e-5)
    assert set.union(*weights) == {1.0, 2.0}
    assert weights[:3] == weights[-3:] == [{1.0}] * 3


def test_the_schedule_advances_by_the_fraction_of_the_epoch(run: Run, config: Config, tmp_path: Path) -> None:
    """The last step of an epoch of n steps, in the middle: (epoch + 1 - 0.5 / n) / 5 of the run, 0.05 of it warm-up."""
    run(config=config)
    ends = [line["step"] for line in read_metrics(tmp_path / "run", "epoch")]
    lines = [line for line in read_metrics(tmp_path / "run", "step") if line["step"] in ends]
    taken = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    assert min(taken) < 3 or config.select.unit == "question"
    for epoch, (line, n) in enumerate(zip(lines, taken, strict=True)):
        progress = ((epoch + 1 - 0.5 / n) / 5 - 0.05) / 0.95
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress, dtype=torch.float64)).item())
        assert line["lr"] == pytest.approx(3e-3 * cosine, rel=1e-9)


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_run_that_selects_goes_on_where_it_was_stopped(run: Run, config: Config, tmp_path: Path, stop: int) -> None:
    """Stopped before, after the first and after the second step of the first epoch that skips."""
    whole = run("whole", config=config)
    with pytest.raises(InterruptedRun):
        run("cut", config=config, stop_after=stop)
    cut = run("cut", config=None, resume=True)
    for name in ("model", "optimizer", "selection"):
        ours, theirs = (load_file(tmp_path / f / "last" / f"{name}.safetensors") for f in ("whole", "cut"))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=0, atol=0, equal_nan=True)
    for ours, theirs in zip(whole["history"], cut["history"], strict=True):
        assert [ours[key] for key in EXACT] == [theirs[key] for key in EXACT]


def test_every_epoch_masks_by_its_ratio(run: Run, tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    keeps: dict[int, set[float]] = {}
    take_step = Trainer.take_step

    def spy(self: Trainer, loaded: Any, *args: Any, **options: Any) -> None:
        masking = loaded.batch.masking
        keeps.setdefault(self.state.epoch, set()).add(1.0 if masking is None else masking.keep)
        take_step(self, loaded, *args, **options)

    monkeypatch.setattr(Trainer, "take_step", spy)
    results = run(config=tiny_config.replace(**{"mask.schedule": [0.25, 0.5, 1.0]}))
    assert keeps == {0: {0.25}, 1: {0.5}, 2: {1.0}}
    assert [line["keep"] for line in results["history"]] == [0.25, 0.5, 1.0]


def test_a_dense_run_skips_nothing(run: Run, config: Config) -> None:
    results = run(config=config.replace(dense=True))
    assert [line["questions_skipped"] for line in results["history"]] == [0] * EPOCHS
    assert results["selection"]["videos_skipped"] == 0.0


def test_the_run_says_what_it_skipped(run: Run, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    results = run(config=config, progress=True)
    line = results["history"][1]
    said = f"{line['videos_skipped']} videos and {line['questions_skipped']} questions skipped"
    assert said in capsys.readouterr().err
