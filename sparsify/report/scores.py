"""One scorer: accuracy by the nine question types, by modality and overall, beside the question-only floor.

The floor is what one gets without looking or listening: the most frequent answer to a template, or to a filled
question, in the training file. Each number stands beside the larger of the two. Percentages are of the questions
scored; a group with none shows ``-``.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sparsify.data.music_avqa import SPLITS, DataRoot, Question, Split
from sparsify.data.templates import ANSWERS, MODALITIES, TYPES
from sparsify.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Floor", "Group", "Scores", "floor", "floor_of", "score"]


@dataclass(frozen=True)
class Floor:
    """The majority answers (labels) of a set of questions: overall, per template and per filled question."""

    majority: int
    by_template: Mapping[str, int]
    by_text: Mapping[str, int]
    learnt_on: str  # name of the split
    questions: int  # how many it was learnt on

    def predict_template(self, question: Question) -> int:
        """The majority label of the question's template; of all questions, for a template never seen."""
        return self.by_template.get(question.template, self.majority)

    def predict_filled(self, question: Question) -> int:
        """The majority label of the filled question; of its template, for a text never seen."""
        found = self.by_text.get(question.text)
        return self.predict_template(question) if found is None else found

    def describe(self) -> str:
        note = "" if self.learnt_on == "train" else ", for want of a training file"
        source = f"{self.learnt_on} ({self.questions:,} questions{note})"
        return f"floor: majority answer per template or filled question of {source}"


@dataclass(frozen=True)
class Group:
    """The scores of a set of questions. Shares are in [0, 1], None where no question was scored."""

    name: str
    asked: int
    scored: int
    correct: int
    accuracy: float | None  # micro: correct / scored
    floor: float | None  # the larger of the next two
    floor_template: float | None
    floor_filled: float | None


@dataclass(frozen=True)
class Scores:
    """What ``score`` returns. ``macro`` holds the means over the types of each modality and over all nine types."""

    types: tuple[Group, ...]  # the nine
    modalities: tuple[Group, ...]  # Audio, Visual, Audio-Visual
    overall: Group
    macro: tuple[Group, ...]  # Audio, Visual, Audio-Visual, overall: means over the types that have a scored question
    floor_source: str
    split: str = ""
    fingerprint: str = ""

    @property
    def accuracy(self) -> float | None:
        """Overall micro accuracy in [0, 1]."""
        return self.overall.accuracy

    def summary(self) -> str:
        """How many of how many questions were scored, on which split, and where the floor comes from."""
        split = f"{self.split} (fingerprint {self.fingerprint}): " if self.split else ""
        return f"{split}{self.overall.scored:,} of {self.overall.asked:,} questions scored; {self.floor_source}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON; shares in [0, 1]."""
        return {
            "split": self.split,
            "fingerprint": self.fingerprint,
            "asked": self.overall.asked,
            "scored": self.overall.scored,
            "floor_source": self.floor_source,
            "overall": _plain(self.overall),
            "macro": {group.name: _plain(group) for group in self.macro},
            "modalities": {group.name: _plain(group) for group in self.modalities},
            "types": {group.name: _plain(group) for group in self.types},
        }

    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """The table as text: group, accuracy, macro, floor, gain in points, scored/asked; modalities follow their
        types.
        """
        rows = []
        macro = {group.name: group.accuracy for group in self.macro}
        for modality in self.modalities:
            rows += [_row(group, "  ", None) for group in self.types if group.name.split("/")[0] == modality.name]
            rows.append(_row(modality, "", macro[modality.name]))
        rows.append(_row(self.overall, "", macro[self.overall.name]))
        return rows

    def table(self) -> str:
        """The scores as a table of plain text, percent."""
        rows = [_HEADER, *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
        lines = []
        for row in rows:
            cells = (
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            )
            lines.append("  ".join(cells).rstrip())
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], self.summary()])

    def rich_table(self) -> Table:
        """The same table for a terminal, as a ``rich.table.Table``."""
        from rich.table import Table

        table = Table(title=self.split or None, caption=self.summary(), caption_justify="left")
        for i, name in enumerate(_HEADER):
            table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
        for row in self.rows():
            is_type = row[0].startswith(" ")
            table.add_row(*row, style=None if is_type else "bold", end_section=not is_type)
        return table


_HEADER = ("percent", "accuracy", "macro", "floor", "gain", "scored")


def floor(questions: Iterable[Question], learnt_on: str = "train") -> Floor:
    """Learn the majority answers of ``questions``; ties go to the lower label. ``DataError`` for no question."""
    overall: Counter[int] = Counter()
    templates: dict[str, Counter[int]] = {}
    texts: dict[str, Counter[int]] = {}
    for question in questions:
        overall[question.label] += 1
        templates.setdefault(question.template, Counter())[question.label] += 1
        texts.setdefault(question.text, Counter())[question.label] += 1
    if not overall:
        raise DataError(f"floor: expected questions to learn the majority answers of {learnt_on} from, got none")
    return Floor(
        majority=_most_frequent(overall),
        by_template={template: _most_frequent(counts) for template, counts in templates.items()},
        by_text={text: _most_frequent(counts) for text, counts in texts.items()},
        learnt_on=learnt_on,
        questions=overall.total(),
    )


def floor_of(root: DataRoot) -> Floor:
    """The floor of a data folder: learnt on its training file, else on val, else on test; ``Floor.describe`` says on
    which.
    """
    for name in SPLITS:
        if root.has(name):
            return floor(root.split(name).questions, name)
    raise DataError(
        f"{root.root}: expected an annotation file to learn the floor from, such as {root.annotation_path('train')}"
    )


def score(
    questions: Sequence[Question],
    predicted_labels: Mapping[int, int] | Sequence[int | None],
    floor: Floor,
    *,
    split: Split | None = None,
) -> Scores:
    """Score predictions on ``questions``: all that were asked, and nothing else decides the groups.

    ``predicted_labels`` is one label a question in the same order (None: not scored), or labels by question id (an id
    that is not there: not scored). Raises ``ValueError`` for another number of labels, an id that was not asked, or a
    label that is none of the 42.
    """
    labels = _labels(questions, predicted_labels)
    rows = list(zip(questions, labels, strict=True))
    types = tuple(_group(str(kind), [row for row in rows if row[0].type == kind], floor) for kind in TYPES)
    modalities = tuple(
        _group(name, [row for row in rows if row[0].type.modality == name], floor) for name in MODALITIES
    )
    overall = _group("overall", rows, floor)
    macro = [
        _mean(name, [g for g, kind in zip(types, TYPES, strict=True) if kind.modality == name]) for name in MODALITIES
    ]
    return Scores(
        types=types,
        modalities=modalities,
        overall=overall,
        macro=(*macro, _mean("overall", types)),
        floor_source=floor.describe(),
        split=split.name if split else "",
        fingerprint=split.fingerprint if split else "",
    )


def _most_frequent(counts: Counter[int]) -> int:
    return min(counts, key=lambda label: (-counts[label], label))


def _labels(questions: Sequence[Question], predicted: Mapping[int, int] | Sequence[int | None]) -> list[int | None]:
    if isinstance(predicted, Mapping):
        extra = set(predicted) - {question.id for question in questions}
        if extra:
            raise ValueError(f"score: predicted_labels has question {min(extra)}, which was not asked")
        found = [predicted.get(question.id) for question in questions]
    else:
        found = list(predicted)
        if len(found) != len(questions):
            raise ValueError(f"score: expected {len(questions)} predicted_labels, one a question, got {len(found)}")
    labels = [None if label is None else operator.index(label) for label in found]
    for question, label in zip(questions, labels, strict=True):
        if label is not None and not 0 <= label < len(ANSWERS):
            raise ValueError(f"score: expected a label in [0, {len(ANSWERS)}) for question {question.id}, got {label}")
    return labels


def _group(name: str, rows: Sequence[tuple[Question, int | None]], floor: Floor) -> Group:
    """Accuracy and floors over the scored rows, so that the two are of the same questions."""
    scored = [(question, label) for question, label in rows if label is not None]
    correct = sum(label == question.label for question, label in scored)
    template = _share(sum(floor.predict_template(q) == q.label for q, _ in scored), len(scored))
    filled = _share(sum(floor.predict_filled(q) == q.label for q, _ in scored), len(scored))
    return Group(
        name=name,
        asked=len(rows),
        scored=len(scored),
        correct=correct,
        accuracy=_share(correct, len(scored)),
        floor=_larger(template, filled),
        floor_template=template,
        floor_filled=filled,
    )


def _mean(name: str, groups: Sequence[Group]) -> Group:
    """The macro form: the unweighted mean of the groups that have a scored question."""
    template = _average([group.floor_template for group in groups])
    filled = _average([group.floor_filled for group in groups])
    return Group(
        name=name,
        asked=sum(group.asked for group in groups),
        scored=sum(group.scored for group in groups),
        correct=sum(group.correct for group in groups),
        accuracy=_average([group.accuracy for group in groups]),
        floor=_larger(template, filled),
        floor_template=template,
        floor_filled=filled,
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _average(shares: Sequence[float | None]) -> float | None:
    """The mean of the shares that are known: a type without a scored question has no part in it."""
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def _larger(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else max(a, b)


def _plain(group: Group) -> dict[str, Any]:
    return {key: value for key, value in asdict(group).items() if key != "name"}


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def _row(group: Group, indent: str, macro: float | None) -> tuple[str, str, str, str, str, str]:
    gain = "-" if group.accuracy is None or group.floor is None else f"{100 * (group.accuracy - group.floor):+.2f}"
    is_type = bool(indent)
    counted = f"{group.scored:,}/{group.asked:,}"
    return (
        indent + (group.name.replace("/", " ") if is_type else group.name),
        _percent(group.accuracy),
        "" if is_type else _percent(macro),
        _percent(group.floor),
        gain,
        counted,
    )
