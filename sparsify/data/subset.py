"""Files that name a part of the training split: ids with the fingerprint of what they were chosen from, or annotations.

``{"format": "sparsify-subset", "version": 1, "fingerprint": "...", "question_ids": [...], ...}`` is what ``sparsify
select`` writes, beside the same questions as a list in MUSIC-AVQA's own form. ``apply_subset`` takes either.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sparsify.data.music_avqa import Question, Split, fingerprint, read_split
from sparsify.errors import DataError

__all__ = ["Subset", "apply_subset", "subset_document", "to_row"]

FORMAT, VERSION = "sparsify-subset", 1


class Subset(NamedTuple):
    """A part of a training split."""

    split: Split  # its questions, in the training split's order
    leaks: dict[str, int]  # ids left out because an evaluated split has them, by split


def subset_document(question_ids: Iterable[int], chosen_from: str, notes: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object for ``question_ids``; ``chosen_from`` is the fingerprint of the split they are of."""
    return (
        {"format": FORMAT, "version": VERSION, "fingerprint": chosen_from}
        | dict(notes)
        | {"question_ids": list(question_ids)}
    )


def to_row(question: Question) -> dict[str, Any]:
    """``question`` as a row of an annotation file; reading it gives the same question, id and fingerprint."""
    return {
        "video_id": question.video_id,
        "question_id": question.id,
        "type": json.dumps(list(question.type)),
        "question_content": question.template,
        "templ_values": json.dumps(list(question.values), ensure_ascii=False),
        "question_deleted": 0,
        "anser": question.answer,
    }


def apply_subset(
    split: Split, path: str | os.PathLike[str], evaluated: Iterable[Split], *, filter_leaks: bool = False
) -> Subset:
    """The part of ``split`` that the file ``path`` names.

    Args:
        split: the training split.
        path: either kind of file.
        evaluated: splits that judge the run. Training on one of their questions would be a leak.
        filter_leaks: leave such questions out and count them, instead of refusing the file.

    Raises:
        DataError: the file is malformed, was made from another split, names a question that ``split`` has not or asks
            otherwise, names one of an evaluated split (without ``filter_leaks``), or nothing is left.
    """
    path = Path(path)
    ids = _read(path, split)
    leaks: dict[str, int] = {}
    for judge in evaluated:
        shared = ids & {question.id for question in judge.questions}
        if shared and not filter_leaks:
            raise DataError(
                f"{path}: {len(shared)} of its {len(ids)} question ids, such as {min(shared)}, are of the split "
                f"{judge.name!r}, which judges the run; --filter-leaks leaves them out"
            )
        if shared:
            leaks[judge.name] = len(shared)
        ids -= shared
    questions = tuple(question for question in split.questions if question.id in ids)
    unknown = ids - {question.id for question in questions}
    if unknown:
        raise DataError(f"{path}: question id {min(unknown)} is not in {split.path} ({len(unknown)} such ids)")
    if not questions:
        raise DataError(f"{path}: expected questions to train on, found none" + (" but leaks" if leaks else ""))
    part = dataclasses.replace(split, path=path, questions=questions, fingerprint=fingerprint(questions), deleted=0)
    return Subset(part, leaks)


def _read(path: Path, split: Split) -> set[int]:
    """The ids that the file names."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected what `sparsify select` writes, or annotations") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if isinstance(data, list):
        return _same_questions(read_split(path), split)
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
        raise DataError(
            f"{path}: expected a list of annotations, or an object with format {FORMAT!r} and version {VERSION}"
        )
    if data.get("fingerprint") != split.fingerprint:
        raise DataError(
            f"{path}: field 'fingerprint': chosen from the split {data.get('fingerprint')}, "
            f"but {split.path} has {split.fingerprint}"
        )
    ids = data.get("question_ids")
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise DataError(f"{path}: field 'question_ids': expected a list of integers")
    if len(set(ids)) != len(ids):
        raise DataError(
            f"{path}: field 'question_ids': expected every id once, {len(ids) - len(set(ids))} are repeated"
        )
    return set(ids)


def _same_questions(part: Split, split: Split) -> set[int]:
    known = {question.id: question for question in split.questions}
    for question in part.questions:
        if question.id in known and known[question.id] != question:
            raise DataError(
                f"{part.path}: question id {question.id} asks {question.text!r} about {question.video_id}; in "
                f"{split.path} it asks {known[question.id].text!r} about {known[question.id].video_id}"
            )
    return {question.id for question in part.questions}
