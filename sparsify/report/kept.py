"""Which samples the key subset of a run holds: by type, by template, and by how hard they were."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sparsify.data.templates import TYPES
from sparsify.report.runs import Run
from sparsify.seal import standing

if TYPE_CHECKING:
    from sparsify.data.music_avqa import DataRoot, Question
    from sparsify.training.selectors import Sample

__all__ = ["PART", "Kept", "Share", "kept_by_paper"]

PART = 0.25  # of the samples: about what the paper keeps
FIFTHS = ("easiest fifth", "second", "third", "fourth", "hardest fifth")


class Share(NamedTuple):
    """Questions of a kind: how many there are, and how many the subset kept."""

    name: str
    asked: int
    kept: int

    @property
    def share(self) -> float:
        return self.kept / self.asked if self.asked else 0.0


class Kept(NamedTuple):
    """A key subset, counted in questions."""

    unit: str  # what was chosen: question or video
    types: tuple[Share, ...]
    templates: tuple[Share, ...]  # most kept first
    difficulty: tuple[Share, ...]  # fifths of the samples by their loss; easiest first
    share: float  # of all questions


def kept_by_paper(run: Run, data: DataRoot | None) -> Kept:
    """The quarter of the run's samples that the paper's rule chooses; ``data`` is the data folder, should the run's
    training file no longer be where it was.

    Raises ``SparsifyError`` where the run left no records, or its training file is not to be found.
    """
    from sparsify.training.run import read_state
    from sparsify.training.selectors import SELECTORS, read_records

    unit = run.config.select.unit
    moved = data is not None and not Path(read_state(standing(run.folder / "last")).train_file).exists()
    file = data.annotation_path("train") if data is not None and moved else None
    records = read_records(run.folder, unit, file)
    samples = records.samples
    chosen = SELECTORS["paper"](samples, max(1, round(PART * len(samples))), 0)
    hardness = _fifths(samples)
    asked = [q for sample in samples for q in sample.questions]
    kept = [q for sample in chosen for q in sample.questions]
    templates = _shares(asked, kept, lambda q: q.template.strip())
    return Kept(
        unit,
        tuple(_ordered(_shares(asked, kept, lambda q: str(q.type)), [str(kind) for kind in TYPES])),
        tuple(sorted(templates, key=lambda row: (-row.share, row.name))),
        tuple(_ordered(_shares(asked, kept, lambda q: FIFTHS[hardness[q.id]]), FIFTHS)),
        len(kept) / len(asked),
    )


def _fifths(samples: Sequence[Sample]) -> dict[int, int]:
    """For every question the fifth, 0 to 4, that its sample is in by loss; without a loss it counts as easiest."""
    order = sorted(samples, key=lambda sample: -1.0 if math.isnan(sample.loss) else sample.loss)
    return {q.id: 5 * place // len(order) for place, sample in enumerate(order) for q in sample.questions}


def _shares(asked: Sequence[Question], kept: Sequence[Question], key: Callable[[Question], str]) -> list[Share]:
    of, among = Counter(map(key, asked)), Counter(map(key, kept))
    return [Share(name, count, among[name]) for name, count in of.items()]


def _ordered(rows: list[Share], names: Sequence[str]) -> list[Share]:
    return sorted(rows, key=lambda row: list(names).index(row.name))
