"""``sparsify data check``: what a data folder holds, what it lacks, and what is wrong with it.

Wrong (``ok`` is false): malformed rows, a question id twice in a split or in two splits (a leak), media files that
cannot be read. Only
counted: videos that are not there or silent (training and evaluation skip the former), videos in two splits (the
published splits share some), repeated questions, identical files, files that nothing asks about.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from sparsify.data.inspect import inspect_media
from sparsify.data.music_avqa import SPLITS, DataRoot, Question, Split, fingerprint, parse_rows
from sparsify.data.templates import PLACEHOLDERS, TYPES, find_template
from sparsify.errors import DataError

__all__ = ["CheckReport", "MediaReport", "SplitReport", "check_root"]

_EXAMPLES = 5  # shown of each kind in the text; to_dict has all
_TYPE_NAMES = tuple(map(str, TYPES))


@dataclass
class SplitReport:
    """What an annotation file holds. Counts are of the rows that could be read."""

    name: str
    path: Path
    questions: int = 0
    videos: int = 0
    types: dict[str, int] = field(default_factory=dict)  # the nine, in order
    templates: int = 0  # different ones, of the 33
    fingerprint: str = ""
    edition: str | None = None  # the published file this is
    deleted: int = 0
    errors: list[str] = field(default_factory=list)  # the file cannot be read, or these rows
    duplicate_ids: list[int] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)  # the same question asked again about a video
    contradictions: list[str] = field(default_factory=list)  # the same with another answer
    unlisted: dict[str, int] = field(default_factory=dict)  # templates and values that are not the data set's


@dataclass
class MediaReport:
    """The videos that are asked about, and the files beside them."""

    checked: bool  # false: only looked whether the files are there
    asked: int = 0
    missing: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)  # video id: reason
    silent: dict[str, str] = field(default_factory=dict)
    identical: list[list[str]] = field(default_factory=list)  # groups of ids whose files have the same bytes
    orphans: list[str] = field(default_factory=list)  # files in videos/ that no question is about


@dataclass
class CheckReport:
    """What ``check_root`` found. Pairs of splits are written ``train/val``."""

    root: Path
    splits: list[SplitReport]
    leaks: dict[str, list[int]]  # pair of splits: ids of questions that are in both
    shared_videos: dict[str, int]  # pair of splits: videos that are in both
    media: MediaReport

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong (what that means: the head of this module)."""
        return not self.problems()

    def problems(self) -> list[str]:
        """Everything that is wrong, a line each."""
        found = []
        for split in self.splits:
            found += _counted(split.errors, "malformed row or file", "malformed rows", f"{split.name}: ", joint="; ")
            found += _counted(split.duplicate_ids, "question id twice", "question ids twice", f"{split.name}: ")
        for pair, ids in self.leaks.items():
            found += _counted(ids, "question id in both (leak)", "question ids in both (leak)", f"{pair}: ")
        reasons = [f"{video_id} ({reason})" for video_id, reason in self.media.broken.items()]
        return found + _counted(reasons, "broken video", "broken videos", "media: ")

    def to_dict(self) -> dict[str, Any]:
        """Everything found as plain values for JSON, lists in full."""
        return {
            "ok": self.ok,
            "root": str(self.root),
            "problems": self.problems(),
            "splits": {split.name: vars(split) | {"path": str(split.path)} for split in self.splits},
            "leaks": self.leaks,
            "shared_videos": self.shared_videos,
            "media": vars(self.media) | {"present": self.media.asked - len(self.media.missing)},
        }

    def text(self) -> str:
        """The report for a reader: tables of counts, then the findings, then the verdict."""
        lines = [f"data root {self.root}", "", *_split_table(self.splits), "", *_type_table(self.splits), ""]
        lines += [note for split in self.splits for note in _split_notes(split)]
        for pair, count in self.shared_videos.items():
            lines.append(f"{pair}: {_counted_word(count, 'video')} in both (allowed)")
        lines += _media_lines(self.media)
        problems = self.problems()
        verdict = "ok" if not problems else "not ok:"
        return "\n".join([*lines, "", verdict, *(f"  {problem}" for problem in problems)])


def check_root(
    root: str | os.PathLike[str] | DataRoot,
    media: bool = True,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> CheckReport:
    """Check the annotation files of a data folder and, unless ``media`` is false, every video they ask about.

    ``progress(done, total)`` is called in this thread after every video; ``workers`` threads read them (default: one
    a core, at most 8). Faults of single files are findings; ``DataError`` only when ROOT is no folder or has no
    annotation file at all.
    """
    root = root if isinstance(root, DataRoot) else DataRoot(root)
    names = [name for name in SPLITS if root.has(name)]
    if not names:
        raise DataError(f"{root.root}: expected an annotation file, such as {root.annotation_path('train')}")
    splits, questions = [], {}
    for name in names:
        report, questions[name] = _check_split(name, root.annotation_path(name))
        splits.append(report)
    leaks, shared = {}, {}
    for a, b in combinations(names, 2):
        pair = f"{a}/{b}"
        leaks[pair] = sorted({q.id for q in questions[a]} & {q.id for q in questions[b]})
        shared[pair] = len({q.video_id for q in questions[a]} & {q.video_id for q in questions[b]})
    asked = dict.fromkeys(q.video_id for name in names for q in questions[name])
    workers = workers or min(8, os.cpu_count() or 1)
    return CheckReport(root.root, splits, leaks, shared, _check_media(root, list(asked), media, progress, workers))


def _check_split(name: str, path: Path) -> tuple[SplitReport, list[Question]]:
    report = SplitReport(name, path)
    questions: list[Question] = []
    try:
        for _, parsed in parse_rows(path):
            if isinstance(parsed, DataError):
                report.errors.append(str(parsed))
            elif parsed is None:
                report.deleted += 1
            else:
                questions.append(parsed)
    except DataError as error:
        report.errors.append(str(error))
    if not questions and not report.errors:
        report.errors.append(f"{path}: expected questions, found none")
    whole = Split(name, path, tuple(questions), fingerprint(questions) if questions and not report.errors else "")
    counts = Counter(str(q.type) for q in questions)
    report.questions, report.videos = len(questions), len(whole.videos)
    report.types = {kind: counts[kind] for kind in _TYPE_NAMES}
    report.templates = len({q.template for q in questions if find_template(q.template)})
    report.fingerprint, report.edition = whole.fingerprint, None if report.errors else whole.edition
    report.duplicate_ids = sorted(i for i, n in Counter(q.id for q in questions).items() if n > 1)
    report.unlisted = _unlisted(questions)
    _note_repeats(report, whole)
    return report, questions


def _note_repeats(report: SplitReport, split: Split) -> None:
    for video_id, questions in split.videos.items():
        answers: dict[str, list[str]] = {}
        for question in questions:
            answers.setdefault(question.text, []).append(question.answer)
        for text, given in answers.items():
            if len(given) > 1:
                kind = report.repeated if len(set(given)) == 1 else report.contradictions
                kind.append(f"{video_id}: {text}")


def _unlisted(questions: Iterable[Question]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for question in questions:
        template = find_template(question.template)
        if template is None:
            found[question.template] += 1
            continue
        if template.type != question.type:
            found[f"{template.text} as {question.type}"] += 1
        for name, value in zip(template.placeholders, question.values, strict=True):
            if value not in PLACEHOLDERS[name]:
                found[f"{name} {value}"] += 1
    return dict(found)


def _check_media(
    root: DataRoot,
    asked: list[str],
    read: bool,
    progress: Callable[[int, int], None] | None,
    workers: int,
) -> MediaReport:
    present = [video_id for video_id in asked if root.video_path(video_id).is_file()]
    here = set(present)
    files = sorted(path.stem for path in (root.root / "videos").glob("*.mp4"))
    report = MediaReport(checked=read, asked=len(asked))
    report.missing = sorted(set(asked) - here)
    report.orphans = sorted(set(files) - set(asked))
    if not read:
        return report
    with ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(inspect_media, root.video_path(video_id)): video_id for video_id in present}
        try:
            for done, job in enumerate(as_completed(jobs), start=1):
                state = job.result()
                if state.broken:
                    report.broken[jobs[job]] = state.broken
                elif state.silent:
                    report.silent[jobs[job]] = state.silent
                if progress:
                    progress(done, len(present))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C must not wait for thousands of files
            raise
    report.broken, report.silent = dict(sorted(report.broken.items())), dict(sorted(report.silent.items()))
    report.identical = _identical({video_id: root.video_path(video_id) for video_id in present})
    return report


def _identical(paths: dict[str, Path]) -> list[list[str]]:
    """Groups of two or more files with the same bytes; only files of the same size are read."""
    by_size: dict[int, list[str]] = {}
    for video_id, path in paths.items():
        by_size.setdefault(path.stat().st_size, []).append(video_id)
    by_hash: dict[bytes, list[str]] = {}
    for size, video_ids in by_size.items():
        if size and len(video_ids) > 1:
            for video_id in video_ids:
                by_hash.setdefault(_hash(paths[video_id]), []).append(video_id)
    return sorted(sorted(group) for group in by_hash.values() if len(group) > 1)


def _hash(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def _counted(items: Sequence[object], one: str, many: str, prefix: str = "", joint: str = ", ") -> list[str]:
    """A line such as ``val: 3 question ids twice: 1, 2, 3``; none for no item."""
    if not items:
        return []
    shown = joint.join(map(str, items[:_EXAMPLES]))
    more = "" if len(items) <= _EXAMPLES else f"{joint}and {len(items) - _EXAMPLES:,} more"
    return [f"{prefix}{len(items):,} {one if len(items) == 1 else many}: {shown}{more}"]


def _counted_word(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def _split_table(splits: Sequence[SplitReport]) -> list[str]:
    rows = [("split", "questions", "videos", "templates", "fingerprint", "published as")]
    for split in splits:
        counts = f"{split.questions:,}", f"{split.videos:,}", f"{split.templates} of 33"
        rows.append((split.name, *counts, split.fingerprint or "-", split.edition or "-"))
    return _table(rows)


def _type_table(splits: Sequence[SplitReport]) -> list[str]:
    rows = [["questions by type", *(split.name for split in splits)]]
    rows += [[f"  {kind.replace('/', ' ')}", *(f"{split.types[kind]:,}" for split in splits)] for kind in _TYPE_NAMES]
    return _table([*rows, ["  all", *(f"{split.questions:,}" for split in splits)]])


def _split_notes(split: SplitReport) -> list[str]:
    lines = []
    if split.deleted:
        lines.append(f"{split.name}: {_counted_word(split.deleted, 'row')} marked question_deleted, left out")
    prefix = f"{split.name}: "
    repeated = _counted(split.repeated, "question asked twice", "questions asked twice", prefix, "; ")
    lines += repeated + _counted(split.contradictions, "with another answer", "with other answers", prefix, "; ")
    unlisted = [f"{name} ({count:,})" for name, count in split.unlisted.items()]
    return lines + _counted(unlisted, "template or value not listed", "templates or values not listed", prefix, "; ")


def _media_lines(media: MediaReport) -> list[str]:
    here = media.asked - len(media.missing)
    lines = [f"videos: {media.asked:,} asked about, {here:,} here, {len(media.missing):,} missing"]
    lines += _counted(media.missing, "missing video", "missing videos", "  ")
    if media.checked:
        lines.append(f"  of the {here:,} here: {len(media.broken):,} broken, {len(media.silent):,} silent")
    else:
        lines.append("  not opened")
    silent = [f"{video_id} ({reason})" for video_id, reason in media.silent.items()]
    lines += _counted(silent, "silent video", "silent videos", "  ")
    groups = [" = ".join(group) for group in media.identical]
    lines += _counted(groups, "group of identical files", "groups of identical files", "  ")
    return lines + _counted(media.orphans, "file nothing asks about", "files nothing asks about", "  ")
