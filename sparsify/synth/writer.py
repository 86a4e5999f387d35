"""Write the built-in data set: plan scenes and questions, render the clips in parallel, put the annotations last.

A folder is the whole data set or visibly not yet: every file appears whole, the annotation files only when all
clips are there, and ``synth.json``, which holds the settings, before anything else. The same command therefore
finishes what an interrupted one began, and does nothing to a finished set.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from sparsify.errors import DataError, UsageError
from sparsify.synth.movie import render_clip
from sparsify.synth.planning import PlannedClip, plan_split
from sparsify.synth.scene import Scene
from sparsify.synth.sound import check_sound_font

__all__ = ["Progress", "render_clips", "settle", "write"]

Progress = Callable[[int, int], None]
Job = tuple[dict[str, Any], str, int]  # Scene.to_dict(), path, frames a second

VERSION = 3  # of what a seed renders to: a set written by another version is another data set
SPLITS = ("train", "val", "test")
SETTINGS = "synth.json"
REPEATS = 3  # questions from one template about a training clip
CHUNK = 8  # clips a task: small enough for a smooth progress bar


def write(
    root: str | os.PathLike[str],
    *,
    train: int = 2000,
    val: int = 200,
    test: int = 400,
    seed: int = 0,
    seconds: float = 4.0,
    size: int = 128,
    fps: int = 8,
    workers: int | None = None,
    questions: tuple[int, int] = (3, 4),
    eval_questions: tuple[int, int] = (3, 4),
    progress: Progress | None = None,
) -> Path:
    """Write ``train``, ``val`` and ``test`` clips with their annotations to ``root`` and return it.

    Clips last ``seconds``, have ``size`` x ``size`` pixels at ``fps`` frames a second, and between ``questions[0]``
    and ``questions[1]`` questions each (``eval_questions`` in val and test), or as many as their scene answers. Of
    one template a training clip may get several, differently filled; elsewhere it gets one. The result depends on the
    settings alone, never on ``workers`` (processes; None: one for each core). ``progress(done, total)`` counts clips.
    Raises ``UsageError`` for settings out of range, a missing sound font, and a ``root`` that holds another data set.
    """
    settings: dict[str, Any] = {
        "version": VERSION, "train": train, "val": val, "test": test, "seed": seed, "seconds": float(seconds),
        "size": size, "fps": fps, "questions": list(questions), "eval_questions": list(eval_questions),
    }  # fmt: skip
    _check(settings)
    if workers is not None and workers < 1:
        raise UsageError(f"synth: workers: expected at least 1, got {workers}")
    check_sound_font()
    root = Path(root)
    _claim(root, settings)
    rows: dict[str, list[dict[str, Any]]] = {}
    scenes: list[dict[str, Any]] = []

    def jobs() -> Iterator[Job]:
        for split, video_id, clip in _planned(settings):
            scenes.append({"video_id": video_id, "split": split} | clip.scene.to_dict())
            rows.setdefault(split, []).extend(_rows(video_id, clip))
            yield clip.scene.to_dict(), str(root / "videos" / f"{video_id}.mp4"), fps

    render_clips(jobs(), train + val + test, workers=workers, progress=progress)
    settle(root / "scenes.jsonl", "".join(json.dumps(scene) + "\n" for scene in scenes))
    first = 0
    for split in SPLITS:
        entries = [row | {"question_id": first + i} for i, row in enumerate(rows.get(split, []))]
        first += len(entries)
        settle(root / "annotations" / f"avqa-{split}.json", json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
    return root


def _check(settings: dict[str, Any]) -> None:
    def need(ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise UsageError(f"synth: {name}: expected {expected}, got {settings[name]!r}")

    for split in SPLITS:
        need(isinstance(settings[split], int) and settings[split] >= 0, split, "a number of clips, 0 or more")
    need(any(settings[split] for split in SPLITS), "train", "at least one clip in train, val and test together")
    need(3.0 <= settings["seconds"] <= 600, "seconds", "between 3 and 600")
    need(
        32 <= settings["size"] <= 2048 and settings["size"] % 2 == 0, "size", "an even number of pixels from 32 to 2048"
    )
    need(1 <= settings["fps"] <= 60, "fps", "between 1 and 60")
    for name in ("questions", "eval_questions"):
        least, most = settings[name]
        need(1 <= least <= most, name, "(least, most) with 1 <= least <= most")


def _claim(root: Path, settings: dict[str, Any]) -> None:
    """Make ``root`` this data set's folder: new, or begun with the same settings."""
    path = root / SETTINGS
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"synth: {path}: cannot be read ({error}); choose another folder") from error
        if found != settings:
            found = found if isinstance(found, dict) else {}
            name = next(key for key in (*settings, *found) if found.get(key) != settings.get(key))
            difference = f"{name} = {found.get(name)!r}, not {settings.get(name)!r}"
            raise UsageError(f"synth: {root} holds a data set with {difference}; choose another folder")
    elif root.exists() and not root.is_dir():
        raise UsageError(f"synth: {root} is a file; expected a folder")
    elif any((root / name).exists() for name in ("annotations", "videos", "scenes.jsonl")):
        raise UsageError(f"synth: {root} holds a data set that synth has not written; choose another folder")
    try:
        for folder in (root / "annotations", root / "videos"):
            folder.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            settle(path, json.dumps(settings, indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"synth: {root} cannot be written: {error.strerror}") from error
    for leftover in (root / "videos").glob(".*.part"):
        leftover.unlink(missing_ok=True)


def _planned(settings: dict[str, Any]) -> Iterator[tuple[str, str, PlannedClip]]:
    """Split, video id and plan of every clip, in order."""
    used: set[Hashable] = set()
    number = 0
    for split in SPLITS:
        rng = random.Random(f"{settings['seed']}/{split}")
        least, most = settings["questions" if split == "train" else "eval_questions"]
        clips = plan_split(
            settings[split],
            rng,
            seconds=settings["seconds"],
            size=settings["size"],
            questions=(least, most),
            repeats=REPEATS if split == "train" else 1,
            used=used,
        )
        for clip in clips:
            yield split, f"{number:08d}", clip
            number += 1


def _rows(video_id: str, clip: PlannedClip) -> Iterator[dict[str, Any]]:
    """Annotation rows with the fields of the real files, question ids still to come."""
    for question in clip.questions:
        kind = question.template.type
        yield {
            "video_id": video_id,
            "question_id": -1,
            "type": json.dumps([kind.modality, kind.kind]),
            "question_content": question.template.text,
            "templ_values": json.dumps(list(question.values)),
            "question_deleted": 0,
            "anser": question.answer,
        }


def render_clips(
    jobs: Iterable[Job], total: int, *, workers: int | None = None, progress: Progress | None = None
) -> None:
    """Render the ``total`` jobs whose file is not there yet, in ``workers`` processes, while later jobs are still being
    planned; ``progress(done, total)`` counts all of them.

    An interrupt leaves whole files only. Raises ``DataError`` when a file cannot be written or a worker dies.
    """
    advance = progress or (lambda done, total: None)
    done = 0
    advance(done, total)
    for finished in _run(_missing(jobs), min(workers or len(os.sched_getaffinity(0)), -(-total // CHUNK))):
        if finished:
            done += finished
            advance(done, total)


class _Chunk(NamedTuple):
    """Some clips to render, and how many were there already when it was put together."""

    jobs: list[Job]
    there: int


def _missing(jobs: Iterable[Job]) -> Iterator[_Chunk]:
    missing: list[Job] = []
    there = 0
    for job in jobs:
        if Path(job[1]).exists():
            there += 1
        else:
            missing.append(job)
        if len(missing) == CHUNK:
            yield _Chunk(missing, there)
            missing, there = [], 0
    yield _Chunk(missing, there)


def _run(chunks: Iterator[_Chunk], workers: int) -> Iterator[int]:
    """Yields the number of clips of each chunk when it is done, in any order."""
    if workers <= 1:
        for chunk in chunks:
            yield chunk.there
            for job in chunk.jobs:
                yield _render_chunk([job])
        return
    # Spawned, not forked: the caller may hold threads (torch's pool), which a fork would freeze in the child.
    with _pool(workers) as pool:
        waiting: set[Future[int]] = set()
        try:
            for chunk in chunks:
                yield chunk.there
                if chunk.jobs:
                    waiting.add(pool.submit(_render_chunk, chunk.jobs))
                ready, waiting = wait(waiting, timeout=0)
                yield from (future.result() for future in ready)
            while waiting:
                ready, waiting = wait(waiting, return_when="FIRST_COMPLETED")
                yield from (future.result() for future in ready)
        except BrokenProcessPool as error:
            raise DataError("synth: a rendering process died; run the same command again to go on") from error


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_ignore_interrupt)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()


def _ignore_interrupt() -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides, and the clip being written gets finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _render_chunk(chunk: list[Job]) -> int:
    for job in chunk:
        _render(*job)
    return len(chunk)


def _render(scene: dict[str, Any], path: str, fps: int) -> None:
    try:
        render_clip(Scene.from_dict(scene), Path(path), fps)
    except OSError as error:
        raise DataError(f"synth: {path} cannot be written: {error.strerror or error}") from error


def settle(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
