"""Selection: an epoch skips a part of what the model finds easy, and what it keeps of that weighs the more.

InfoBatch (Qin et al., arXiv 2303.04947), as Diao et al., ACL 2025, section 3.4 use it. Before an epoch, samples with a
loss above the mean are hard (D1), the others easy (D2). A share r of D2, drawn at random, is skipped, and the rest of
D2 weighs ``1 / (1 - r)``: every sample's expected weight is 1, so that of the sum of gradients over the epoch, too.
The first epoch, which knows no losses, and the last ones (``Config.skip_at``) see every sample, with weight 1.

A sample is a question, or a video with all of its questions, whose loss is the mean of theirs: only a video that is
not asked about at all need not be encoded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsify.batch import Questions
from sparsify.config import Config
from sparsify.data.music_avqa import Question, Split
from sparsify.errors import CheckpointError
from sparsify.training.loading import draw_seed

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["SELECTION", "Selection", "Skipped", "epoch_weights"]

SELECTION = "selection.safetensors"


def epoch_weights(loss: Tensor, skip: float, seed: int) -> Tensor:
    """Draw an epoch: the weight of every sample, 0 for those that it skips.

    Of n easy samples ``floor(skip * n + u)`` are skipped, u uniform in [0, 1): each of them with probability ``skip``
    exactly, in any number. Where that could leave no sample with a loss, ``skip`` is less: one is left, and weighs n.

    Args:
        loss: fp32 [U], each sample's last loss; NaN where there is none yet (such a sample is kept, with weight 1).
        skip: share of the easy samples to skip, in [0, 1).
        seed: decides the draw; drawn on the CPU, so the same for losses on any device.

    Returns:
        fp32 [U]: 1 for hard samples, 0 or ``1 / (1 - skip)`` for easy ones. Of those with a loss one at least is kept.
    """
    weight = torch.ones_like(loss)
    known = loss[~loss.isnan()].double()
    if skip == 0 or not len(known):
        return weight
    easy = (loss.double() <= known.mean()).nonzero().flatten()  # NaN is neither above nor below
    skip = min(skip, (len(known) - 1) / len(easy))
    generator = torch.Generator().manual_seed(seed)
    rounding = torch.rand((), dtype=torch.float64, generator=generator).item()
    order = torch.randperm(len(easy), generator=generator).to(easy.device)
    count = min(math.floor(skip * len(easy) + rounding), len(known) - 1)
    weight[easy] = 1.0 / (1.0 - skip)
    weight[easy[order[:count]]] = 0.0
    return weight


class Skipped(NamedTuple):
    """What an epoch leaves out."""

    questions: int
    videos: int  # not encoded: none of their questions is asked


class Selection:
    """Losses, weights and history of the samples of ``split``; the tensors live on ``device``, as the model does.

    Attributes:
        loss: fp32 [U], the last loss of each of the U samples; NaN before the first.
        weight: fp32 [U], in the epoch under way; 0: skipped.
        kept: bool [N, U], what each of the run's N epochs kept; False for epochs to come.
        losses: fp32 [N, U], ``loss`` as each epoch left it; NaN for epochs to come.
    """

    def __init__(self, split: Split, config: Config, device: torch.device) -> None:
        self.config = config
        by_video = config.select.unit == "video"
        self.video_ids = list(split.videos)
        video_number = {name: number for number, name in enumerate(self.video_ids)}
        self.question_id = torch.tensor([q.id for q in split.questions], dtype=torch.int64)
        videos = torch.tensor([video_number[q.video_id] for q in split.questions], dtype=torch.int64)
        self._video = videos  # int64 [questions]
        self._sample = videos if by_video else torch.arange(len(videos))  # int64 [questions]
        self._place = {q.id: sample for q, sample in zip(split.questions, self._sample.tolist(), strict=True)}
        self._by_video = by_video
        samples, epochs = int(self._sample.max()) + 1, config.train.epochs
        self.loss = torch.full((samples,), math.nan, device=device)
        self.weight = torch.ones(samples, device=device)
        self.kept = torch.zeros(epochs, samples, dtype=torch.bool, device=device)
        self.losses = torch.full((epochs, samples), math.nan, device=device)
        self._fresh = torch.zeros(samples, dtype=torch.bool, device=device)  # recorded here, unknown to other processes

    def start_epoch(self, epoch: int) -> None:
        """Draw the weights of ``epoch`` from the losses known so far."""
        seed = draw_seed(self.config.train.seed, epoch)
        self.weight = epoch_weights(self.loss, self.config.skip_at(epoch), seed)
        self.kept[epoch] = self.weight > 0

    def end_epoch(self, epoch: int) -> None:
        """Keep what ``epoch`` left as losses."""
        self.losses[epoch] = self.loss

    def asked(self) -> tuple[list[bool], frozenset[int] | None]:
        """For every video of the split whether it is asked about, and the ids of the questions asked; None: all."""
        questions = self._asked_questions()
        videos = torch.zeros(len(self.video_ids), dtype=torch.bool)
        videos[self._video[questions]] = True
        if self._by_video or questions.all():
            return videos.tolist(), None
        return videos.tolist(), frozenset(self.question_id[questions].tolist())

    def skipped(self) -> Skipped:
        """What the epoch under way leaves out."""
        questions = self._asked_questions()
        return Skipped(int((~questions).sum()), len(self.video_ids) - len(self._video[questions].unique()))

    def _asked_questions(self) -> Tensor:
        return (self.weight > 0).cpu()[self._sample]  # bool [questions]

    def places(self, questions: Sequence[Question]) -> Tensor:
        """int64 [Q]: the sample that each question belongs to."""
        return torch.tensor([self._place[q.id] for q in questions], dtype=torch.int64)

    def record(self, places: Tensor, losses: Tensor, questions: Questions) -> None:
        """Take note of the losses of a batch; what is not in it keeps its last ones.

        Args:
            places: int64 [Q], of ``places``, on the losses' device.
            losses: [Q], one a question, any floating dtype.
            questions: the batch's; with unit ``video`` all of a video's questions are in it.
        """
        losses = losses.float()
        if self._by_video:
            # One row a video, one column a question: sums in a fixed order, which scattered additions would not have.
            rows, columns = questions.video_index, questions.rank
            table = losses.new_zeros(2, len(rows), questions.width)  # no more videos than questions
            table[0, rows, columns] = losses
            table[1, rows, columns] = 1.0
            sums, counts = table.sum(-1)
            losses = (sums / counts)[rows]  # [Q]: every question with its video's mean
        self.loss[places] = losses
        self._fresh[places] = True

    def synchronise(self, accelerator: Accelerator) -> None:
        """Every process learns what the others recorded."""
        if accelerator.num_processes > 1:
            mine = torch.stack([torch.where(self._fresh, self.loss, 0.0), self._fresh.float()])
            total, count = accelerator.reduce(mine, "sum")
            self.loss = torch.where(count > 0, total / count.clamp_min(1), self.loss)
        self._fresh.zero_()

    def save(self, folder: Path) -> None:
        """Adds ``selection.safetensors`` to a checkpoint folder."""
        save_file({name: value.contiguous().cpu() for name, value in self._state().items()}, folder / SELECTION)

    def load(self, folder: Path) -> None:
        """The inverse of ``save``; ``CheckpointError`` when it is missing or of another split or run length."""
        path = folder / SELECTION
        try:
            saved = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        for name, value in self._state().items():
            if name not in saved:
                raise CheckpointError(f"{path}: {name!r} is missing")
            if saved[name].shape != value.shape or saved[name].dtype != value.dtype:
                expected, came = (f"{t.dtype} {list(t.shape)}" for t in (value, saved[name]))
                raise CheckpointError(f"{path}: {name!r}: expected {expected}, got {came}")
        if not torch.equal(saved["question_id"], self.question_id):
            raise CheckpointError(f"{path}: 'question_id': expected the questions of the training split, in its order")
        for name in ("loss", "weight", "kept", "losses"):
            getattr(self, name).copy_(saved[name])

    def _state(self) -> dict[str, Tensor]:
        return {
            "loss": self.loss,
            "weight": self.weight,
            "kept": self.kept,
            "losses": self.losses,
            "question_id": self.question_id,
            "sample": self._sample,  # of each question
        }
