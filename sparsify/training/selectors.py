"""Selectors: which samples of a run's training split are worth training on again. One interface, several rules.

A selector takes the run's samples and a size and returns so many samples, best first; ``SELECTORS`` has them by name.
What they know of a sample is in ``Sample``: the paper's score and the losses that the run's epochs left.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from sparsify.data.music_avqa import Question, Split, fingerprint, read_split
from sparsify.errors import UsageError
from sparsify.seal import check_seal, standing
from sparsify.training.key_subset import key_scores
from sparsify.training.run import read_state
from sparsify.training.selection import SELECTION

__all__ = ["SELECTORS", "Records", "Sample", "read_records"]

TAIL = 0.1  # share of the samples that ``robust`` takes for too hard to learn, or wrong


class Sample(NamedTuple):
    """A question, or a video with its questions, that some epoch kept."""

    number: int  # the question's id, or the video's place in the training file: ties go to the lower one
    questions: tuple[Question, ...]
    score: Fraction  # of ``select_key_subset``; for a video the mean of its questions'
    loss: float  # mean over the second half of the epochs and over its questions; NaN if it has none


class Records(NamedTuple):
    """What a run left for a selector."""

    samples: list[Sample]
    epochs: int  # finished ones
    skipping: bool  # whether any epoch skipped anything: else every sample has the same score
    fingerprint: str  # of the annotation file that the samples are of


Selector = Callable[[Sequence[Sample], int, int], list[Sample]]


def read_records(run: Path, unit: str, train: Path | None = None) -> Records:
    """The samples of the run folder ``run``, by ``unit``: ``question`` or ``video``.

    ``train`` is the annotation file it trained on, if that is no longer where it was. Videos that could not be read
    are left out.

    Raises:
        CheckpointError: the folder holds no checkpoint, or one that is not as it was written.
        DataError: the annotation file cannot be read.
        UsageError: it is not the one that the run used, or no epoch is finished.
    """
    last = standing(run / "last")
    check_seal(last)
    state = read_state(last)
    if state.epoch == 0:
        raise UsageError(f"{run}: no epoch is finished yet; expected records of at least one")
    saved = load_file(last / SELECTION)
    file = train or Path(state.train_file)
    split = read_split(file, "train")
    questions = _questions(split, saved["question_id"].tolist(), state.fingerprints["train"])
    place = saved["sample"]  # int64 [questions]: of each question in the rows of ``kept`` and ``losses``
    kept = saved["kept"][: state.epoch][:, place]  # bool [epochs, questions]
    scores = key_scores(saved["question_id"][row].tolist() for row in kept)
    losses = _late(saved["losses"][: state.epoch])[place].tolist()
    loss = {question.id: value for question, value in zip(questions, losses, strict=True)}
    groups: dict[int, list[Question]] = {}
    numbers = {name: number for number, name in enumerate(dict.fromkeys(q.video_id for q in questions))}
    for question in questions:
        if question.id in scores and question.video_id not in state.skipped:
            groups.setdefault(question.id if unit == "question" else numbers[question.video_id], []).append(question)
    samples = [
        Sample(
            number,
            tuple(members),
            sum((scores[q.id] for q in members), Fraction(0)) / len(members),
            math.fsum(loss[q.id] for q in members) / len(members),
        )
        for number, members in groups.items()
    ]
    return Records(samples, state.epoch, not bool(kept.all()), split.fingerprint)


def _questions(split: Split, ids: list[int], expected: str) -> list[Question]:
    """The run's questions in its order: all of ``split``, or those of the subset that it trained on."""
    known = {question.id: question for question in split.questions}
    questions = [known[i] for i in ids if i in known]
    if len(questions) != len(ids) or fingerprint(questions) != expected:
        raise UsageError(
            f"{split.path}: is not the annotation file that the run trained on (fingerprint {expected}); "
            "--train FILE names it"
        )
    return questions


def _late(losses: Tensor) -> Tensor:
    """fp32 [U]: the mean over the second half of the epochs [N, U], in which the model knows something."""
    return losses[len(losses) // 2 :].nanmean(0)


def _by_score(samples: Sequence[Sample]) -> list[Sample]:
    return sorted(samples, key=lambda sample: (-sample.score, sample.number))


def _random(samples: Sequence[Sample], size: int, seed: int) -> list[Sample]:
    """The control: every sample alike."""
    return random.Random(seed).sample(sorted(samples, key=lambda sample: sample.number), size)


def _paper(samples: Sequence[Sample], size: int, seed: int) -> list[Sample]:
    """``select_key_subset``."""
    return _by_score(samples)[:size]


def _stratified(samples: Sequence[Sample], size: int, seed: int) -> list[Sample]:
    """The paper's scores within each question type and template, all of which keep their share.

    Again and again the best sample with a question of the stratum that lacks most is taken.
    """
    asked = Counter((q.type, q.template) for sample in samples for q in sample.questions)
    lacking = {stratum: Fraction(count * size, len(samples)) for stratum, count in asked.items()}
    queues: dict[tuple, list[Sample]] = {stratum: [] for stratum in asked}
    for sample in reversed(_by_score(samples)):  # the best is at the end of each queue
        for stratum in {(q.type, q.template) for q in sample.questions}:
            queues[stratum].append(sample)
    order = {stratum: place for place, stratum in enumerate(sorted(asked))}
    chosen: dict[int, Sample] = {}
    while len(chosen) < size:
        stratum = min((s for s in queues if queues[s]), key=lambda s: (-lacking[s], order[s]))
        sample = queues[stratum].pop()
        if sample.number not in chosen:
            chosen[sample.number] = sample
            for q in sample.questions:
                lacking[q.type, q.template] -= 1
    return list(chosen.values())


def _robust(samples: Sequence[Sample], size: int, seed: int) -> list[Sample]:
    """The paper's scores without the hardest tail, and with what is asked and answered already counting less.

    Of the samples beyond the ``1 - TAIL`` quantile of the loss none is taken while others are left: they are wrong, or
    not to be learnt from (SeTa, arXiv 2503.13385, drops them as well). The others are taken one by one, each time the
    one with the largest ``score / (1 + n)``, n being how often, on average over its questions, the same question with
    the same answer is taken already: information less redundancy, as in InfoMax (arXiv 2506.01701).
    """
    ranked = sorted(samples, key=lambda sample: (math.isnan(sample.loss), sample.loss, sample.number))
    learnable = max(size, math.ceil((1 - TAIL) * len(ranked)))
    taken: Counter[tuple[str, str]] = Counter()

    def gain(sample: Sample) -> Fraction:
        repeated = sum(taken[q.text, q.answer] for q in sample.questions)
        return sample.score / (1 + Fraction(repeated, len(sample.questions)))

    heap = [(-gain(sample), sample.number, sample) for sample in ranked[:learnable]]
    heapq.heapify(heap)
    chosen: list[Sample] = []
    while len(chosen) < size:
        _, number, sample = heapq.heappop(heap)
        now = -gain(sample)
        if heap and (now, number) > heap[0][:2]:  # gains only fall: one that still leads is the largest
            heapq.heappush(heap, (now, number, sample))
            continue
        chosen.append(sample)
        taken.update((q.text, q.answer) for q in sample.questions)
    return chosen


SELECTORS: dict[str, Selector] = {
    "paper": _paper,
    "random": _random,
    "robust": _robust,
    "stratified": _stratified,
}
