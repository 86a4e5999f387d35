"""Stand-in clips for a real annotation file: rendered under its video ids, showing what its questions speak of as
far as that is easy.

They serve to run check, training and evaluation on the real file without its videos. The answers are not promised
to be true.
"""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

from sparsify.data.music_avqa import Question, read_split
from sparsify.data.templates import INSTRUMENTS
from sparsify.errors import DataError, UsageError
from sparsify.synth.casting import cast
from sparsify.synth.plans import MAX_PLAYERS, Plan
from sparsify.synth.questions import COUNTS
from sparsify.synth.scene import Scene
from sparsify.synth.sound import check_sound_font
from sparsify.synth.writer import Job, Progress, render_clips

__all__ = ["write_standins"]


def write_standins(
    root: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    *,
    videos: int = 200,
    seed: int = 0,
    seconds: float = 4.0,
    size: int = 128,
    fps: int = 8,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Render ``ROOT/videos/<id>.mp4`` for the first ``videos`` video ids of ``annotations``, copy that file to
        ``ROOT/annotations``, return the ids.

    Files that are there already are kept, so that real videos are never replaced. Deterministic in ``seed`` and the
    file.
    """
    check_sound_font()
    if videos < 1:
        raise UsageError(f"synth: videos: expected at least 1, got {videos}")
    source = Path(annotations)
    chosen = list(read_split(source).videos.items())[:videos]
    root = Path(root)
    target = root / "annotations" / source.name
    jobs: list[Job] = []
    for video_id, questions in chosen:
        scene = _scene(questions, random.Random(f"{seed}/{video_id}"), seconds, size)
        jobs.append((scene.to_dict(), str(root / "videos" / f"{video_id}.mp4"), fps))
    try:
        for folder in (target.parent, root / "videos"):
            folder.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copyfile(source, target)
    except OSError as error:
        raise DataError(f"synth: {root} cannot be written: {error.strerror}") from error
    render_clips(jobs, len(jobs), workers=workers, progress=progress)
    return [video_id for video_id, _ in chosen]


def _scene(questions: tuple[Question, ...], rng: random.Random, seconds: float, size: int) -> Scene:
    """A scene with the instruments that the questions and answers name, as many as they count, in the place
    they say.
    """
    answers = [q.answer for q in questions]
    named = [word for q in questions if q.answer != "no" for word in (*q.values, q.answer) if word in INSTRUMENTS]
    names = list(dict.fromkeys(named)) or [rng.choice(INSTRUMENTS)]
    counted = max((COUNTS.index(a) for a in answers if a in COUNTS), default=1)
    names = (names + [names[0]] * max(0, counted - len(names)))[:MAX_PLAYERS]
    scene = cast(Plan(seen=len(names), sounding=len(names), voiceover=_has_voiceover(questions)), rng, seconds, size)
    players = [
        replace(
            p, instrument=name, voice=replace(p.voice, instrument=name, part=names[:i].count(name)) if p.voice else None
        )
        for i, (p, name) in enumerate(zip(scene.players, names, strict=True))
    ]
    place = next((a for a in answers if a in ("indoor", "outdoor")), scene.place)
    return replace(scene, players=tuple(players), place=place)


def _has_voiceover(questions: tuple[Question, ...]) -> bool:
    return any("voiceover" in q.template and q.answer == "yes" for q in questions)
