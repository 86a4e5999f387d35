"""Videos with their questions as training sees them: a dataset of videos, their batches, and decoding a split ahead of
time.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch.utils.data import Dataset, get_worker_info

from sparsify.batch import Batch, Clip, Masking, Questions, Video
from sparsify.data.cache import ClipCache
from sparsify.data.media import read_clip
from sparsify.data.mel import SILENCE_DB
from sparsify.data.seeds import mask_seed
from sparsify.errors import ConfigError, MediaError, SparsifyError

if TYPE_CHECKING:
    from sparsify.config import Config
    from sparsify.data.music_avqa import DataRoot, Question, Split

__all__ = [
    "INPUTS",
    "Item",
    "PrepareReport",
    "VideoDataset",
    "batch_questions",
    "collate",
    "cores",
    "prepare",
    "stack_clips",
]

INPUTS = ("both", "blind", "deaf", "textonly")
_FEW = 4  # videos: decoded here; starting processes would take longer


class Encoder(Protocol):
    """What is needed of a vocabulary."""

    def encode(self, text: str, max_words: int) -> list[int]: ...


class Item(NamedTuple):
    """One video with its questions; ``clip`` is None where it cannot be read, and ``error`` says why."""

    video_id: str
    clip: Clip | None
    questions: tuple[Question, ...]
    words: tuple[list[int], ...]  # of each question
    error: str | None = None


class VideoDataset(Dataset[Item]):
    """The videos of a split, each with all of its questions; item ``i`` is the i-th video of the annotation file.

    A video that cannot be read is an item without a clip, noted in ``skipped`` and not tried again (each loading
    process keeps its own notes). Clips of a cache are mapped files: after the first time an item costs microseconds,
    and all processes share one copy.

    Args:
        root: where the videos are.
        split: which, and their questions.
        config: sampling and geometry.
        vocabulary: turns questions into word ids.
        cache: where decoded clips are kept; None decodes anew each time.
        inputs: ``both``; ``blind``: every frame is black; ``deaf``: every mel image is that of silence; ``textonly``:
            both. Without a cache what is blanked is not decoded either.
        skipped: videos already known to be unreadable, with the reason (``PrepareReport.skipped``).

    Raises:
        ConfigError: ``inputs`` is none of the four.
        UsageError: a question is empty or longer than ``config.text.max_words``.
    """

    def __init__(
        self,
        root: DataRoot,
        split: Split,
        config: Config,
        vocabulary: Encoder,
        cache: ClipCache | None = None,
        inputs: str = "both",
        skipped: dict[str, str] | None = None,
    ) -> None:
        if inputs not in INPUTS:
            raise ConfigError(f"inputs: expected one of {', '.join(INPUTS)}, got {inputs!r}")
        self.config = config
        self.cache = cache
        self.skipped = dict(skipped or {})
        self._see = inputs in ("both", "deaf")
        self._hear = inputs in ("both", "blind")
        self._videos = [(v, root.video_path(v), questions) for v, questions in split.videos.items()]
        words = config.text.max_words
        encoded = {q.text: vocabulary.encode(q.text, words) for q in split.questions}
        self._words = [tuple(encoded[q.text] for q in questions) for _, _, questions in self._videos]

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index: int) -> Item:
        video_id, path, questions = self._videos[index]
        words = self._words[index]
        if video_id not in self.skipped:
            try:
                return Item(video_id, self._clip(path), questions, words)
            except MediaError as error:
                self.skipped[video_id] = str(error)
        return Item(video_id, None, questions, words, self.skipped[video_id])

    def _clip(self, path: Path) -> Clip:
        # Loading processes run side by side already: one thread each.
        threads = 1 if get_worker_info() is not None else 0
        if self.cache is None:
            return read_clip(path, self.config, frames=self._see, audio=self._hear, threads=threads)
        clip = self.cache.get(path, threads=threads)
        if not self._see:
            clip = clip._replace(frames=torch.zeros_like(clip.frames))
        if not self._hear:
            clip = clip._replace(mel=torch.full_like(clip.mel, SILENCE_DB), has_audio=torch.tensor(False))
        return clip


def collate(items: Sequence[Item], *, epoch: int = 0, run_seed: int = 0, keep: float = 1.0) -> Batch | None:
    """One step's batch of the items that have a clip; None when none has.

    Args:
        items: from ``VideoDataset``; broken ones are left out, with their questions.
        epoch: 0-based, for the seeds.
        run_seed: for the seeds.
        keep: share of the mask units kept; below 1 the batch carries a ``Masking`` with the seeds of ``mask_seed``
            (modalities ``visual`` and ``audio``, by frame and segment).

    Returns:
        The batch, videos and questions in the order of ``items``.
    """
    whole = [(item, item.clip) for item in items if item.clip is not None]
    if not whole:
        return None
    video = stack_clips([clip for _, clip in whole])
    asked = [question for item, _ in whole for question in item.questions]
    masking = None
    if keep < 1:
        names = [item.video_id for item, _ in whole]

        def seeds(modality: str, count: int) -> torch.Tensor:
            rows = [[mask_seed(run_seed, epoch, name, modality, i) for i in range(count)] for name in names]
            return torch.tensor(rows, dtype=torch.int64)

        masking = Masking(seeds("visual", video.frames.shape[1]), seeds("audio", video.mel.shape[1]), keep)
    return Batch(
        video=video,
        questions=batch_questions([item.words for item, _ in whole]),
        label=torch.tensor([q.label for q in asked], dtype=torch.int64),
        question_id=torch.tensor([q.id for q in asked], dtype=torch.int64),
        video_id=tuple(item.video_id for item, _ in whole),
        masking=masking,
    )


def stack_clips(clips: Sequence[Clip]) -> Video:
    """V clips of one configuration as one ``Video``."""
    return Video(*(torch.stack([getattr(clip, name) for clip in clips]) for name in Video._fields))


def batch_questions(words: Sequence[Sequence[list[int]]]) -> Questions:
    """The questions of V videos, ``words[v]`` the word ids of each question of video v, as one ``Questions`` padded
    with 0.
    """
    flat = [(v, rank, ids) for v, ids_of in enumerate(words) for rank, ids in enumerate(ids_of)]
    length = max((len(ids) for _, _, ids in flat), default=0)
    rows = [ids + [0] * (length - len(ids)) for _, _, ids in flat]
    lengths = torch.tensor([len(ids) for _, _, ids in flat], dtype=torch.int64)
    return Questions(
        tokens=torch.tensor(rows, dtype=torch.int64).reshape(len(flat), length),
        valid=torch.arange(length) < lengths[:, None],
        video_index=torch.tensor([v for v, _, _ in flat], dtype=torch.int64),
        rank=torch.tensor([rank for _, rank, _ in flat], dtype=torch.int64),
        width=max((len(ids_of) for ids_of in words), default=0),
    )


@dataclass(frozen=True)
class PrepareReport:
    """What ``prepare`` did: counts of videos, and the unreadable ones with the reason."""

    decoded: int
    cached: int
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def videos(self) -> int:
        return self.decoded + self.cached + len(self.skipped)


def prepare(
    root: DataRoot,
    split: Split,
    config: Config,
    cache: ClipCache | None,
    progress: Callable[[int], object] | None = None,
    workers: int | None = None,
) -> PrepareReport:
    """Decode every video of ``split`` into ``cache``, several at once; what is there already is left alone.

    Args:
        root: where the videos are.
        split: which.
        config: sampling and geometry, as the cache's.
        cache: None only tries whether the videos can be read.
        progress: called with the number of videos newly done.
        workers: decoding processes; None: one a core; 0: this process.

    Returns:
        Counts, and the reason for each video that cannot be read, in the order of the file.

    Raises:
        SparsifyError: the cache cannot be written, or a decoding process was killed.
    """
    advance = progress or (lambda count: None)
    reasons: dict[str, str | None] = {}
    missing: dict[str, Path] = {}
    for video_id in split.videos:
        path = root.video_path(video_id)
        if cache is not None and path.exists() and cache.has(path):
            advance(1)
        else:
            missing[video_id] = path
    processes = min(cores() if workers is None else workers, len(missing))
    for video_id, reason in zip(missing, _tried(list(missing.values()), config, cache, processes), strict=True):
        reasons[video_id] = reason
        advance(1)
    skipped = {video_id: reason for video_id, reason in reasons.items() if reason is not None}
    return PrepareReport(len(missing) - len(skipped), len(split.videos) - len(missing), skipped)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tried(paths: list[Path], config: Config, cache: ClipCache | None, processes: int) -> Iterator[str | None]:
    """For each path in order: decode it; None, or why it cannot be read."""
    if processes < 2 or len(paths) <= _FEW:
        for path in paths:
            yield _try(path, config, cache, threads=0)
        return
    pool = ProcessPoolExecutor(processes, initializer=_start_worker, initargs=(config, cache))
    try:
        chunk = max(1, min(8, len(paths) // (4 * processes)))
        yield from pool.map(_try_in_worker, paths, chunksize=chunk)
    except BrokenProcessPool as error:
        raise SparsifyError("a decoding process was killed (out of memory?); try fewer workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _try(path: Path, config: Config, cache: ClipCache | None, threads: int) -> str | None:
    try:
        if cache is None:
            read_clip(path, config, threads=threads)
        else:
            cache.get(path, threads=threads)
    except MediaError as error:
        return str(error)
    return None


_worker: tuple[Config, ClipCache | None] | None = None


def _start_worker(config: Config, cache: ClipCache | None) -> None:
    """Once a decoding process: the processes are the parallelism, and Ctrl-C is the parent's to handle."""
    global _worker
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker = (config, cache)


def _try_in_worker(path: Path) -> str | None:
    assert _worker is not None
    return _try(path, *_worker, threads=1)
