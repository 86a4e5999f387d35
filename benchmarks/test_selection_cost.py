"""What selection adds to a step and checkpoints add to an epoch: the demo's model, 3,000 videos with 15 questions each.

Selection: the samples and weights of a step's questions, taking note of their losses, and a step's part of drawing,
counting and keeping an epoch. Checkpoint: ``last/`` and ``best/``, sealed and flushed, as after an epoch that is the
best so far; the epoch is one that skips. Ratios are of one run, in turns; the targets are 1 % and 2 %.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator

from sparsify.batch import Batch, Masking, Questions, Video
from sparsify.config import Config
from sparsify.data.dataset import batch_questions
from sparsify.data.music_avqa import Question, QuestionType, Split
from sparsify.data.vocabulary import Vocabulary
from sparsify.model import SparsifyModel
from sparsify.training.loading import Loaded
from sparsify.training.optim import Precision
from sparsify.training.trainer import Trainer, TrainingData

VIDEOS, ASKED, WORDS, ROUNDS = 3000, 15, 14, 7


def split() -> Split:
    kind = QuestionType("Audio-Visual", "Counting")
    numbers = [(v, ASKED * v + i) for v in range(VIDEOS) for i in range(ASKED)]
    questions = tuple(Question(i, f"{v:08d}", kind, "Where?", (), "Where?", "two", i % 42) for v, i in numbers)
    return Split("train", Path("avqa-train.json"), questions, "0123")


def step_of(trainer: Trainer) -> Loaded:
    """The batch of a masked step."""
    config = trainer.config
    c, v, a, videos = config.clip, config.vision, config.audio, config.train.videos
    draw = torch.Generator().manual_seed(0)
    video = Video(
        torch.randint(0, 256, (videos, c.frames, v.units**2, 3 * v.unit**2), dtype=torch.uint8, generator=draw),
        (20 * torch.randn(videos, c.segments, a.units**2, a.unit**2, generator=draw) - 40).half(),
        torch.arange(c.frames).float().expand(videos, -1),
        torch.zeros(videos, c.segments),
        torch.full((videos,), float(c.frames)),
    )
    words: Questions = batch_questions([[list(range(2, 2 + WORDS))] * ASKED] * videos)
    asked = trainer.data.train_split.questions[: videos * ASKED]
    masking = Masking(torch.arange(videos * c.frames).view(videos, -1), torch.arange(videos).view(videos, -1), 0.5)
    batch = Batch(
        video=video,
        questions=words,
        label=torch.tensor([q.label for q in asked]),
        question_id=torch.tensor([q.id for q in asked]),
        video_id=tuple(dict.fromkeys(q.video_id for q in asked)),
        masking=masking,
    )
    return Loaded(batch, asked, {})


@pytest.fixture(params=["video", "question"])
def trainer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Trainer]:
    config = Config.preset("demo").replace(**{"select.skip": 0.5, "select.unit": request.param})
    torch.manual_seed(0)
    model = SparsifyModel(config, Vocabulary.build())
    nothing = cast(Any, None)  # neither loaded from nor judged
    data = TrainingData(nothing, split(), list(range(VIDEOS)), nothing, nothing, nothing)
    trainer = Trainer(config, model, data, tmp_path, Accelerator(cpu=True), Precision("fp32", ""), progress=False)
    trainer.selection.loss.uniform_(0, 2)
    yield trainer
    trainer.metrics.close()


def seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def test_selection_and_checkpoints_cost_next_to_nothing(benchmark: Any, trainer: Trainer) -> None:
    selection, loaded = trainer.selection, step_of(trainer)
    assert loaded.batch is not None
    losses, questions = torch.rand(len(loaded.questions)), loaded.batch.questions

    def step() -> None:
        trainer.take_step(loaded, VIDEOS // trainer.config.train.videos, counts=True)

    def in_a_step() -> None:
        places = selection.places(loaded.questions)
        (selection.weight[places] * losses).sum()
        selection.record(places, losses, questions)

    def in_an_epoch() -> None:
        selection.synchronise(trainer.accelerator)
        selection.skipped()
        selection.end_epoch(1)
        selection.start_epoch(2)
        selection.asked()

    def checkpoint() -> None:
        trainer.write("best", trainer.model.save_pretrained)
        trainer.save_last()

    times: dict[str, list[float]] = {"step": [], "in a step": [], "in an epoch": [], "checkpoint": []}
    for _ in range(ROUNDS):
        for name, function in zip(times, (step, in_a_step, in_an_epoch, checkpoint), strict=True):
            times[name].append(seconds(function))
    median = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first warms up
    benchmark.group = "a step of 24 videos"
    benchmark.pedantic(step, rounds=3)
    selection.start_epoch(1)
    steps = sum(selection.asked()[0]) / trainer.config.train.videos
    selecting = (median["in a step"] + median["in an epoch"] / steps) / median["step"]
    saving = median["checkpoint"] / (steps * median["step"])
    print(f"\nunit {trainer.config.select.unit}: " + ", ".join(f"{k} {1e3 * v:.2f} ms" for k, v in median.items()))
    print(f"selection {selecting:.2%} of a step, the checkpoint {saving:.2%} of an epoch of {steps:.0f} steps")
    assert selecting <= 0.01
    assert saving <= 0.02
