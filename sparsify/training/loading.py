"""Which videos a step sees, in an order that only seed and epoch decide, and their batches."""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sparsify.batch import Batch
from sparsify.data.dataset import Item, VideoDataset, collate
from sparsify.data.music_avqa import Question
from sparsify.training.run import leave_locks

__all__ = [
    "Loaded",
    "DeadWorkerError",
    "draw_seed",
    "epoch_order",
    "gather_skipped",
    "load_batches",
    "share",
    "start_loading",
    "step_seed",
    "to_device",
    "worker_died",
]

T = TypeVar("T")


class DeadWorkerError(RuntimeError):
    """A loading process is dead, and what waits for its batch is between two steps."""


class Loaded(NamedTuple):
    """One step's data: the readable videos as a batch (None when there are none) and what was left out."""

    batch: Batch | None
    questions: tuple[Question, ...]  # in the batch's order
    skipped: dict[str, str]  # video id to reason


def epoch_order(videos: int, seed: int, epoch: int) -> list[int]:
    """A permutation of ``range(videos)``, the same wherever and whenever it is drawn."""
    generator = torch.Generator().manual_seed(_hash("order", seed, epoch))
    return torch.randperm(videos, generator=generator).tolist()


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of what is random inside a training step (dropout): a resumed run needs no generator state."""
    return _hash("step", seed, step, rank)


def draw_seed(seed: int, epoch: int) -> int:
    """Seed of the draw of the samples that an epoch skips."""
    return _hash("select", seed, epoch)


def _hash(*parts: object) -> int:
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def share(videos: Sequence[T], rank: int, world: int) -> list[T]:
    """The part of a step's, or a split's, videos that process ``rank`` of ``world`` works on: sizes differ by at most
    one."""
    return list(videos[rank::world])


def gather_skipped(skipped: dict[str, str], world: int) -> dict[str, str]:
    """The unreadable videos, with reasons, of all ``world`` processes, in one order for all."""
    if world == 1:
        return skipped
    from accelerate.utils import gather_object

    return {video: reason for part in gather_object([skipped]) for video, reason in part.items()}


def load_batches(
    dataset: VideoDataset,
    steps: Sequence[Sequence[int]],
    *,
    epoch: int,
    run_seed: int,
    keep: float,
    workers: int,
    pin: bool,
    asked: frozenset[int] | None = None,
) -> Iterator[Loaded]:
    """One ``Loaded`` for each list of indices in ``steps``, in order; ``keep < 1`` draws the masks of ``epoch``.

    ``asked`` are the ids of the questions to ask; None asks all of the steps' videos. ``next`` raises
    ``DeadWorkerError``.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=steps,  # type: ignore[arg-type]
        collate_fn=functools.partial(_collate, epoch=epoch, run_seed=run_seed, keep=keep, asked=asked),
        num_workers=workers,
        worker_init_fn=functools.partial(start_loading, parent=os.getpid()),
        pin_memory=pin,
    )
    if workers == 0 or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return _arriving(iter(loader))
    # torch would raise the news of a dead worker wherever this process is, amid a step, say. It finds out, too, when
    # it waits for a batch.
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return _arriving(iter(loader))
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _arriving(batches: Iterator[Loaded]) -> Iterator[Loaded]:
    while True:
        try:
            loaded = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if worker_died(error):
                raise DeadWorkerError(str(error)) from error
            raise
        yield loaded


def worker_died(error: RuntimeError) -> bool:
    """Whether torch tells by ``error`` that a loading process is dead."""
    return "DataLoader worker" in str(error)


def start_loading(worker: int, parent: int) -> None:
    """In a new loading process: let go of the locks of ``parent``, and end if that was killed already.

    torch's own watch would wait forever for a parent that died before the watch began.
    """
    leave_locks()
    if multiprocessing.get_start_method() == "fork" and os.getppid() != parent:
        os._exit(1)


def _collate(items: list[Item], *, epoch: int, run_seed: int, keep: float, asked: frozenset[int] | None) -> Loaded:
    if asked is not None:
        items = [_only(item, asked) for item in items]
    return Loaded(
        collate(items, epoch=epoch, run_seed=run_seed, keep=keep),
        tuple(question for item in items if item.clip is not None for question in item.questions),
        {item.video_id: item.error or "cannot be read" for item in items if item.clip is None},
    )


def _only(item: Item, asked: frozenset[int]) -> Item:
    kept = [i for i, question in enumerate(item.questions) if question.id in asked]
    return item._replace(questions=tuple(item.questions[i] for i in kept), words=tuple(item.words[i] for i in kept))


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with the tensors in it, and in named tuples in it, on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(field, device) for field in value))
    return value
