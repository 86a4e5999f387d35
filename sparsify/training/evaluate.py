"""Evaluation: every question of every readable video of a split, beside the floor."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsify.data.dataset import VideoDataset
from sparsify.data.music_avqa import DataRoot, Question, QuestionType, Split
from sparsify.data.templates import ANSWERS
from sparsify.errors import DataError, UsageError
from sparsify.progress import Advance
from sparsify.report.scores import Floor, Scores, floor_of, score
from sparsify.training.checkpoints import write_text
from sparsify.training.loading import Loaded, load_batches, share, to_device
from sparsify.training.optim import choose_precision

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sparsify.data.cache import ClipCache
    from sparsify.model import SparsifyModel

__all__ = ["EvalResult", "Prediction", "evaluate", "evaluate_dataset", "masked_keep", "write_predictions"]

EVALUATION_EPOCH = -1  # masks of an evaluation are none that a training epoch draws


class Prediction(NamedTuple):
    """The model's answer to one question."""

    question_id: int
    type: QuestionType
    answer: str
    probability: float
    correct: bool


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found; shares are of the questions that were scored, ``asked`` counts all of the split."""

    split: str
    fingerprint: str
    keep: float  # share of the mask units that were encoded; 1: not masked
    inputs: str
    scores: Scores
    predictions: list[Prediction]  # in the split's order
    asked: int
    scored: int
    skipped: dict[str, str]  # unreadable video to reason
    loss: float  # mean cross entropy over the scored questions
    super_tokens: float  # mean over the videos
    seconds: float

    @property
    def accuracy(self) -> float:
        return sum(p.correct for p in self.predictions) / len(self.predictions)

    def counts(self) -> str:
        """ "812 of 820 questions scored (2 videos skipped)"."""
        skipped = f" ({len(self.skipped)} unreadable videos skipped)" if self.skipped else ""
        return f"{self.scored} of {self.asked} questions scored{skipped}"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the predictions, ready for JSON."""
        plain = (
            "split",
            "fingerprint",
            "keep",
            "inputs",
            "asked",
            "scored",
            "skipped",
            "loss",
            "super_tokens",
            "seconds",
        )
        return {name: getattr(self, name) for name in plain} | {
            "accuracy": self.accuracy,
            "scores": self.scores.to_dict(),
        }


def evaluate(
    model: SparsifyModel,
    root: DataRoot,
    split: str | Split = "test",
    *,
    cache: ClipCache | None = None,
    batch_size: int = 32,
    masked: bool = False,
    inputs: str = "both",
    floor: Floor | None = None,
    seed: int | None = None,
    precision: str = "auto",
    workers: int = 0,
    advance: Advance | None = None,
) -> EvalResult:
    """Answer every question of ``split`` and score the answers.

    Args:
        model: a model with its ``config`` and ``vocabulary``; its device is used, its mode restored.
        root: the data folder.
        split: a split or its name.
        cache: decoded clips; None decodes each video.
        batch_size: videos at a time. Answers do not depend on it.
        masked: encode only the configured share of the mask units, drawn from ``seed`` and the video's name.
        inputs: ``both``, or what the model is not to see: ``blind``, ``deaf``, ``textonly``.
        floor: majority answers to compare with; None learns them from ``root``.
        seed: of the masks; None takes the run's.
        precision: ``auto``, ``fp32`` or ``bf16``.
        workers: loading processes.
        advance: told the number of videos done.

    Raises:
        DataError: the split is malformed, or none of its videos can be read.
    """
    split = root.split(split) if isinstance(split, str) else split
    config = model.config
    dataset = VideoDataset(root, split, config, model.vocabulary, cache, inputs=inputs)
    return evaluate_dataset(
        model,
        dataset,
        split,
        floor=floor or floor_of(root),
        batch_size=batch_size,
        keep=masked_keep(config) if masked else 1.0,
        inputs=inputs,
        seed=config.train.seed if seed is None else seed,
        precision=precision,
        workers=workers,
        advance=advance,
    )


def masked_keep(config: Any) -> float:
    """Share of the mask units in a masked evaluation: the smallest that training uses; 1 for a dense model."""
    if config.dense:
        return 1.0
    return min(config.mask.schedule, default=config.mask.keep)


@torch.inference_mode()
def evaluate_dataset(
    model: SparsifyModel,
    dataset: VideoDataset,
    split: Split,
    *,
    floor: Floor,
    batch_size: int,
    keep: float,
    inputs: str = "both",
    seed: int,
    precision: str = "auto",
    workers: int = 0,
    advance: Advance | None = None,
    accelerator: Accelerator | None = None,
) -> EvalResult:
    """``evaluate`` on an open dataset. The processes of an ``accelerator`` share the videos; all get the result."""
    started = time.perf_counter()
    device = next(model.parameters()).device
    bf16 = choose_precision(precision, device).name == "bf16"
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    mine = share(range(len(dataset)), rank, world)
    steps = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    was_training = model.training
    model.eval()
    answered: list[tuple[Question, int, float, float]] = []
    tokens = 0
    skipped: dict[str, str] = {}
    try:
        for step, loaded in zip(
            steps,
            load_batches(
                dataset,
                steps,
                epoch=EVALUATION_EPOCH,
                run_seed=seed,
                keep=keep,
                workers=workers,
                pin=device.type == "cuda",
            ),
            strict=True,
        ):
            skipped |= loaded.skipped
            if loaded.batch is not None:
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    labels, probabilities, losses, encoded = _answer(model, loaded, device)
                answered += zip(loaded.questions, labels, probabilities, losses, strict=True)
                tokens += encoded
            if advance is not None:
                advance(len(step))
    finally:
        model.train(was_training)
    if accelerator is not None and world > 1:
        answered, skipped, tokens = _gather(answered, skipped, tokens)
    return _result(
        answered, split, floor, skipped, tokens, keep=keep, inputs=inputs, seconds=time.perf_counter() - started
    )


def _answer(
    model: SparsifyModel, loaded: Loaded, device: torch.device
) -> tuple[list[int], list[float], list[float], int]:
    """Label, probability and loss of every question of a batch, and the number of super-tokens they attended to."""
    assert loaded.batch is not None
    batch = to_device(loaded.batch, device)
    tokens = model.encode(batch.video, batch.masking)
    logits = model.answer(tokens, batch.questions).float()  # [Q, 42]
    losses = F.cross_entropy(logits, batch.label, reduction="none")
    probability, label = logits.softmax(-1).max(-1)
    packed: Tensor = torch.stack([label.double(), probability.double(), losses.double()]).cpu()  # one transfer
    labels, probabilities, loss_list = packed.tolist()
    return [int(x) for x in labels], probabilities, loss_list, int(tokens.valid.sum())


def _gather(answered: list, skipped: dict[str, str], tokens: int) -> tuple[list, dict[str, str], int]:
    """The parts of all processes together."""
    from accelerate.utils import gather_object

    parts = gather_object([(answered, skipped, tokens)])
    merged = {video: reason for _, part, _ in parts for video, reason in part.items()}
    return [a for part, _, _ in parts for a in part], merged, sum(n for _, _, n in parts)


def _result(
    answered: list[tuple[Question, int, float, float]],
    split: Split,
    floor: Floor,
    skipped: dict[str, str],
    tokens: int,
    *,
    keep: float,
    inputs: str,
    seconds: float,
) -> EvalResult:
    if not answered:
        reason = next(iter(skipped.values()), "it has no videos")
        raise DataError(f"{split.path}: none of the {len(skipped)} videos of this split can be read ({reason})")
    by_id = {question.id: (label, probability) for question, label, probability, _ in answered}
    predictions = [
        Prediction(question.id, question.type, ANSWERS[label], probability, label == question.label)
        for question in split.questions
        if question.id in by_id
        for label, probability in [by_id[question.id]]
    ]
    return EvalResult(
        split=split.name,
        fingerprint=split.fingerprint,
        keep=keep,
        inputs=inputs,
        scores=score(split.questions, {number: label for number, (label, _) in by_id.items()}, floor, split=split),
        predictions=predictions,
        asked=len(split.questions),
        scored=len(predictions),
        skipped=skipped,
        loss=math.fsum(loss for *_, loss in answered) / len(answered),
        super_tokens=tokens / len({question.video_id for question, *_ in answered}),
        seconds=seconds,
    )


def write_predictions(path: Path, predictions: list[Prediction]) -> None:
    """Writes a ``.json`` (list of objects) or ``.csv`` file, whole or not at all; ``UsageError`` for other names."""
    rows = [prediction._asdict() | {"type": str(prediction.type)} for prediction in predictions]
    if path.suffix == ".json":
        text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    elif path.suffix == ".csv":
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, Prediction._fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    else:
        raise UsageError(f"--predictions {path}: expected a name ending in .json or .csv")
    write_text(path, text)
