"""MUSIC-AVQA's annotation files (v1 and v2.0): a strict reader that keeps every question of every video.

A file is a JSON list of rows::

    {"video_id": "00000028", "question_id": 7, "type": "[\\"Audio-Visual\\", \\"Existential\\"]",
     "question_content": "Is the <Object> in the video always playing?", "templ_values": "[\\"ukulele\\"]",
     "question_deleted": 0, "anser": "yes"}

What the reader accepts and why:

- ``question_deleted`` may be absent (v2.0). A row marked 1 is left out and counted (``Split.deleted``); in the
  published files none is.
- ``question_id`` is required, except in v2.0 files, whose added rows have none. A file is taken for v2.0 when a row
  without an id is about a YouTube video (an 11-character id, or one with ``_flip``), as only v2.0 has them. Such rows
  get an id from 2^40 on, hashed from video, type, question and answer: the same row has the same id in any file, so
  that a leak between splits is seen.
- A template other than the 33, and a value other than those of ``templates.PLACEHOLDERS``, is accepted as long as the
  text can be filled (the files hold values that validation never shows); ``sparsify data check`` counts them.
- Everything else that is off is a ``DataError`` naming file, row (the first is row 1), field, what was expected and
  what came.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsify.data.templates import ANSWER_LABEL, TYPES, QuestionType, fill, find_template, placeholders
from sparsify.errors import DataError

__all__ = ["SPLITS", "DataRoot", "Question", "QuestionType", "Split", "fingerprint", "parse_rows", "read_split"]

SPLITS = ("train", "val", "test")

# Question counts of the published files. Both v1 releases circulate: 45,867 questions as in the paper, 45,624 after its
# update.
_EDITIONS = {
    32_087: "MUSIC-AVQA v1 train, first release",
    4_595: "MUSIC-AVQA v1 val, first release",
    9_185: "MUSIC-AVQA v1 test, first release",
    31_927: "MUSIC-AVQA v1 train, updated",
    4_568: "MUSIC-AVQA v1 val, updated",
    9_129: "MUSIC-AVQA v1 test, updated",
}
_YOUTUBE_ID = re.compile(r"(?![a-z]*\d+$)[A-Za-z0-9_-]{11}")
_FILE_NAME = re.compile(r"(?!\.{1,2}$)[^\s/\\](?:[^/\\]*[^\s/\\])?")  # no separator, no space around, not . or ..
_FIRST_DERIVED_ID = 2**40
_MISSING = object()


@dataclass(frozen=True, slots=True)
class Question:
    """One question of the data set with its answer."""

    id: int
    video_id: str
    type: QuestionType
    template: str  # as the data set writes it, placeholders not filled
    values: tuple[str, ...]
    text: str  # filled, single spaces, ASCII question mark
    answer: str
    label: int  # index of the answer in templates.ANSWERS


@dataclass(frozen=True)
class Split:
    """The questions of one annotation file, in file order."""

    name: str
    path: Path
    questions: tuple[Question, ...]
    fingerprint: str
    deleted: int = 0  # rows left out because question_deleted is 1

    @cached_property
    def videos(self) -> dict[str, tuple[Question, ...]]:
        """Every video with all of its questions; videos by first appearance, questions in file order."""
        videos: dict[str, list[Question]] = {}
        for question in self.questions:
            videos.setdefault(question.video_id, []).append(question)
        return {video_id: tuple(questions) for video_id, questions in videos.items()}

    @property
    def edition(self) -> str | None:
        """Which published file this is, judged by its number of questions (several circulate); None when it is none of
        them.
        """
        if any(question.id >= _FIRST_DERIVED_ID for question in self.questions):
            return "MUSIC-AVQA v2.0"
        return _EDITIONS.get(len(self.questions))

    def describe(self) -> str:
        """One line to print with every result: name, counts, fingerprint, and the published file if it is one."""
        known = f" ({self.edition})" if self.edition else ""
        counts = f"{len(self.questions):,} questions, {len(self.videos):,} videos"
        return f"{self.name}{known}: {counts}, fingerprint {self.fingerprint}"


class DataRoot:
    """A data folder: ``ROOT/annotations/avqa-{train,val,test}.json`` and ``ROOT/videos/<video_id>.mp4``.

    ``train``, ``val`` and ``test`` name other annotation files (v2.0 has balanced and biased ones). ``DataError`` when
    ROOT is no folder.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        train: str | os.PathLike[str] | None = None,
        val: str | os.PathLike[str] | None = None,
        test: str | os.PathLike[str] | None = None,
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(
                f"{self.root}: expected a data folder with annotations/ and videos/, found {_what_is(self.root)}"
            )
        files = dict(zip(SPLITS, (train, val, test), strict=True))
        self._named = {name: Path(path) for name, path in files.items() if path is not None}
        self._read: dict[str, Split] = {}

    def __repr__(self) -> str:
        return f"DataRoot({str(self.root)!r})"

    def annotation_path(self, name: str) -> Path:
        """The annotation file of split ``name``, whether or not it exists."""
        if name not in SPLITS:
            raise DataError(f"no split {name!r}; expected one of {', '.join(SPLITS)}")
        return self._named.get(name, self.root / "annotations" / f"avqa-{name}.json")

    def has(self, name: str) -> bool:
        """Whether split ``name`` has an annotation file. A file that was named on purpose counts as there: reading it
        says it is not.
        """
        return name in self._named or self.annotation_path(name).exists()

    def split(self, name: str) -> Split:
        """Split ``name``, read once. ``DataError`` as ``read_split``."""
        path = self.annotation_path(name)
        if name not in self._read:
            self._read[name] = read_split(path, name)
        return self._read[name]

    def video_path(self, video_id: str) -> Path:
        return self.root / "videos" / f"{video_id}.mp4"


def read_split(path: str | os.PathLike[str], name: str | None = None) -> Split:
    """Read an annotation file; ``name`` defaults to the file's name without ``avqa-`` and ``.json``.

    Raises ``DataError`` for a file that is missing, unreadable, not JSON, not a list or empty, for the first malformed
    row (see the head of this module), and for a question id that occurs twice.
    """
    path = Path(path)
    questions: list[Question] = []
    row_of: dict[int, int] = {}
    deleted = 0
    for row, parsed in parse_rows(path):
        if isinstance(parsed, DataError):
            raise parsed
        if parsed is None:
            deleted += 1
            continue
        first = row_of.setdefault(parsed.id, row)
        if first != row:
            raise _row_error(
                path, row, "question_id", "an id used once in the file", f"{parsed.id}, which row {first} has"
            )
        questions.append(parsed)
    if not questions:
        raise DataError(f"{path}: expected questions, found none ({deleted} marked question_deleted)")
    return Split(name or path.stem.removeprefix("avqa-"), path, tuple(questions), fingerprint(questions), deleted)


def fingerprint(questions: Iterable[Question]) -> str:
    """A short name for a set of questions: the first 12 hex digits of SHA-256 over id, video, text and answer of each.

    It does not depend on the order of the rows, nor on how the file is formatted: two files with one fingerprint ask
    the same.
    """
    lines = sorted(json.dumps([q.id, q.video_id, str(q.type), q.text, q.answer]) for q in questions)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def parse_rows(path: Path) -> Iterator[tuple[int, Question | DataError | None]]:
    """Every row of ``path`` with its number (from 1): a question, the error in it, or None when it is marked deleted.

    Raises ``DataError`` when the file as a whole cannot be read. Ids are not compared with each other here.
    """
    rows = _load_list(path)
    ids_optional = any(_is_v2_row(row) for row in rows)
    copies: dict[int, int] = {}
    for number, row in enumerate(rows, start=1):
        try:
            parsed = _parse_row(row, ids_optional)
        except _BadFieldError as bad:
            yield number, _row_error(path, number, bad.field, bad.expected, bad.came)
            continue
        if parsed is not None and parsed.id < 0:
            parsed = _with_derived_id(parsed, copies)
        yield number, parsed


class _BadFieldError(Exception):
    def __init__(self, field: str, expected: str, came: str) -> None:
        super().__init__(field)
        self.field, self.expected, self.came = field, expected, came


def _row_error(path: Path, row: int, field: str, expected: str, came: str) -> DataError:
    where = f"{path}: row {row}" + (f", field {field!r}" if field else "")
    return DataError(f"{where}: expected {expected}, got {came}")


def _load_list(path: Path) -> list[Any]:
    try:
        data = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation file; expected a MUSIC-AVQA JSON list there") from None
    except OSError as error:
        raise DataError(f"{path}: expected a readable annotation file: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8 text, got byte 0x{error.object[error.start]:02x} at {error.start}"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: expected JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists thousands deep
        raise DataError(f"{path}: expected a JSON list of rows: {error}") from None
    if not isinstance(data, list):
        raise DataError(f"{path}: expected a JSON list of rows, got {_kind(data)}")
    return data


def _is_v2_row(row: Any) -> bool:
    if not isinstance(row, dict) or "question_id" in row or not isinstance(row.get("video_id"), str):
        return False
    return _YOUTUBE_ID.fullmatch(row["video_id"].removesuffix("_flip")) is not None


def _parse_row(row: Any, ids_optional: bool) -> Question | None:
    """The question of a row; its id is -1 when the row has none and need not."""
    if not isinstance(row, dict):
        raise _BadFieldError("", "an object with the fields of a question", _kind(row))
    deleted = row.get("question_deleted", 0)
    if isinstance(deleted, bool) or deleted not in (0, 1):
        raise _BadFieldError("question_deleted", "0 or 1", _show(deleted))
    if deleted:
        return None
    video_id = _video_id(row)
    question_id = -1 if ids_optional and "question_id" not in row else _question_id(row)
    question_type = _question_type(row)
    template = _field(row, "question_content")
    if not isinstance(template, str) or not template.strip():
        raise _BadFieldError("question_content", "a question", _show(template))
    values = _values(row, template)
    text = fill(template, values)
    if "<" in text or ">" in text:
        raise _BadFieldError("question_content", "placeholders like <Object>, each closed", _show(template))
    answer = _field(row, "anser")
    if not isinstance(answer, str) or answer not in ANSWER_LABEL:
        raise _BadFieldError("anser", f"one of the {len(ANSWER_LABEL)} answers of MUSIC-AVQA", _show(answer))
    known = find_template(template)
    return Question(
        id=question_id,
        video_id=video_id,
        type=question_type,
        template=known.text if known else template,
        values=values,
        text=text,
        answer=answer,
        label=ANSWER_LABEL[answer],
    )


def _field(row: dict[str, Any], name: str) -> Any:
    value = row.get(name, _MISSING)
    if value is _MISSING:
        raise _BadFieldError(name, "the field to be there", f"only {', '.join(map(str, row)) or 'an empty object'}")
    return value


def _video_id(row: dict[str, Any]) -> str:
    value = _field(row, "video_id")
    if not isinstance(value, str) or _FILE_NAME.fullmatch(value) is None or not value.isprintable():
        raise _BadFieldError("video_id", "a video's file name without .mp4 (no path separators)", _show(value))
    return value


def _question_id(row: dict[str, Any]) -> int:
    value = _field(row, "question_id")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise _BadFieldError("question_id", "an integer from 0 on", _show(value))
    return value


def _question_type(row: dict[str, Any]) -> QuestionType:
    value = _field(row, "type")
    parts = _json_strings(value)
    if parts is None:
        raise _BadFieldError("type", 'a JSON list in a string, like ["Audio", "Counting"]', _show(value))
    if tuple(parts) not in TYPES:
        raise _BadFieldError("type", f"one of {', '.join(map(str, TYPES))}", _show(value))
    return QuestionType(*parts)


def _values(row: dict[str, Any], template: str) -> tuple[str, ...]:
    raw = _field(row, "templ_values")
    values = _json_strings(raw)
    if values is None or not all(value.strip() for value in values):
        raise _BadFieldError("templ_values", 'a JSON list of values in a string, like ["violin"]', _show(raw))
    names = placeholders(template)
    if len(values) != len(names):
        wanted = (
            f"{len(names)} values for {' '.join(names)}" if names else "no values for a question without placeholders"
        )
        raise _BadFieldError("templ_values", f"{wanted} in {template!r}", _show(raw))
    return tuple(values)


def _json_strings(value: Any) -> list[str] | None:
    """The list of strings that the JSON text ``value`` is; None when it is anything else."""
    if not isinstance(value, str):
        return None
    try:
        items = json.loads(value)
    except (ValueError, RecursionError):
        return None
    return items if isinstance(items, list) and all(isinstance(item, str) for item in items) else None


def _with_derived_id(question: Question, copies: dict[int, int]) -> Question:
    """``question`` with an id from its content; the n-th copy of a row gets its own, so that no question is lost."""
    content = [question.video_id, str(question.type), question.text, question.answer]
    digest = hashlib.sha256(json.dumps(content).encode()).digest()
    base = int.from_bytes(digest[:8], "big") % 2**51
    copy = copies[base] = copies.get(base, -1) + 1
    fields = {name: getattr(question, name) for name in Question.__dataclass_fields__}
    return Question(**fields | {"id": _FIRST_DERIVED_ID + base + copy})


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _what_is(path: Path) -> str:
    return "a file" if path.exists() else "nothing there"
