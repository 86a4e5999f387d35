"""The run folder: who may write to it, and where its run is.

config.json  metrics.jsonl  tensorboard/
results.json, predictions.json   at the end: scores, and the best model's answers
best/        the model after the epoch with the highest validation accuracy
last/        the newest model, optimizer.safetensors, selection.safetensors and training.json: what a resumed run needs
epoch-*/     the same at the end of the last epochs, as many as train.keep_last says
run.lock     while a process trains here: its number
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsify.config import Config
from sparsify.errors import CheckpointError, UsageError

__all__ = [
    "RunState",
    "claim_run",
    "leave_locks",
    "lock_run",
    "read_state",
    "restore_optimizer",
    "write_state",
]

STATE_VERSION = 2
ORPHAN_SECONDS = 10.0  # decoding processes of a killed run hold its lock until they notice
_held: list[int] = []  # file descriptors of the locks of this process


@dataclass
class RunState:
    """Where a run is: everything beside weights and optimiser moments that decides what comes next."""

    epoch: int = 0  # the epoch under way, 0-based
    step: int = 0  # steps taken in it
    steps: int = 0  # steps taken in all
    loss_sum: float = 0.0  # weighted, over the questions of the epoch under way
    weight_sum: float = 0.0  # of these questions
    questions: int = 0
    videos: int = 0
    best_epoch: int | None = None
    best_accuracy: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)  # one entry a finished epoch
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("prepare", "train", "evaluate", "save"), 0.0)
    )
    left_out: list[str] = field(default_factory=list)  # training videos that could not be read when the run began
    skipped: dict[str, str] = field(default_factory=dict)  # these and those that could not be read later, with reason
    saves_failed: int = 0  # within epochs
    fingerprints: dict[str, str] = field(default_factory=dict)  # of the splits
    train_file: str = ""  # the annotation file of the training split
    metrics_bytes: int = 0

    def epoch_line(self) -> dict[str, Any]:
        """What the metrics say of the epoch under way, of all that is counted here."""
        return {
            "epoch": self.epoch,
            "loss": self.loss_sum / max(1.0, self.weight_sum),
            "questions": self.questions,
            "videos": self.videos,
            "videos_unreadable": len(self.skipped),
            "saves_failed": self.saves_failed,
            "train_seconds": self.seconds["train"],
            "evaluate_seconds": self.seconds["evaluate"],
            "save_seconds": self.seconds["save"],
        }

    def next_epoch(self) -> None:
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum, self.weight_sum, self.questions, self.videos = 0.0, 0.0, 0, 0


def claim_run(folder: Path, config: Config | None, resume: bool) -> Config:
    """The configuration of the run that ``folder`` is to hold, or holds; writes nothing.

    Raises:
        UsageError: the folder holds a run and ``resume`` is off, or that run was configured differently.
    """
    path = folder / "config.json"
    used = [
        name for name in ("config.json", "metrics.jsonl", "last", "best", "results.json") if (folder / name).exists()
    ]
    if used and not resume:
        raise UsageError(f"{folder} already holds a run ({used[0]}); resume it, or choose another output folder")
    if path.exists():
        earlier = _read_config(path)
        if config is not None:
            _refuse_other_config(folder, config, earlier)
        config = config or earlier
    elif config is None:
        raise UsageError(f"{folder} holds no run to resume: it has no config.json")
    return config


def _read_config(path: Path) -> Config:
    try:
        return Config.from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None


def _refuse_other_config(folder: Path, config: Config, earlier: Config) -> None:
    """How clips are loaded and what is saved may change in a continued run; what decides the weights may not."""
    free = ("workers", "save_seconds", "keep_last")
    same = earlier.replace(**{f"train.{key}": getattr(config.train, key) for key in free})
    if same == config:
        return
    old, new = _flat(same.to_dict()), _flat(config.to_dict())
    key = next(k for k in new if new[k] != old.get(k))
    raise UsageError(f"{folder}: the run to resume has {key} = {old.get(key)!r}, now {new[key]!r} is asked for")


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


@contextlib.contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Holds ``folder/run.lock`` for this process; ``UsageError`` when another one does. A killed process holds nothing.

    The folder is made if need be, and removed again if nothing was written to it.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: expected a folder for the run, found a file")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.lock"
    deadline = time.monotonic() + ORPHAN_SECONDS
    while (lock := _try_lock(path)) is None:
        holder = _holder(path)
        if holder is None or _alive(holder) or time.monotonic() > deadline:
            raise UsageError(f"{folder}: another run (process {holder or 'unknown'}) is training into this folder")
        time.sleep(0.2)
    try:
        os.truncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        _held.append(lock)
        yield
    finally:
        if lock in _held:
            _held.remove(lock)
        path.unlink(missing_ok=True)
        os.close(lock)
        with contextlib.suppress(OSError):
            folder.rmdir()


def leave_locks() -> None:
    """In a forked loading process: let go of the locks that came with the fork.

    It lives for seconds after its parent was killed, and would keep the run from being resumed.
    """
    while _held:
        os.close(_held.pop())


def _try_lock(path: Path) -> int | None:
    """An open, locked file descriptor of ``path``, or None while another process holds it."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        os.close(lock)  # the holder before us removed the file between open and lock: take the new one


def _holder(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_state(folder: Path, state: RunState, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Adds ``optimizer.safetensors`` and ``training.json`` to a checkpoint folder."""
    save_file(
        {
            f"{key}/{name}": value.detach().contiguous().cpu()
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        },
        folder / "optimizer.safetensors",
    )
    data = {"version": STATE_VERSION} | dataclasses.asdict(state)
    (folder / "training.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_state(folder: Path) -> RunState:
    """The state that ``write_state`` left in ``folder``; ``CheckpointError`` names what is missing or strange."""
    path = folder / "training.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; this checkpoint cannot be resumed") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict) or data.pop("version", None) != STATE_VERSION:
        raise CheckpointError(f"{path}: expected a training state of version {STATE_VERSION}")
    names = {f.name for f in dataclasses.fields(RunState)}
    if set(data) != names:
        raise CheckpointError(f"{path}: expected the keys {', '.join(sorted(names))}, got {', '.join(sorted(data))}")
    return RunState(**data)


def restore_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads what ``write_state`` saved of ``optimizer``; ``CheckpointError`` when it is not of this model."""
    path = folder / "optimizer.safetensors"
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in saved.items():
        kind, _, name = key.partition("/")
        states.setdefault(name, {})[kind] = value
    parameters = dict(model.named_parameters())
    for name, values in states.items():
        if name not in parameters:
            raise CheckpointError(f"{path}: holds {name!r}, which this model has not")
        for kind, value in values.items():
            if kind != "step" and value.shape != parameters[name].shape:
                shapes = f"{tuple(parameters[name].shape)}, got {tuple(value.shape)}"
                raise CheckpointError(f"{path}: {kind} of {name!r}: expected shape {shapes}")
    number = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    packed = optimizer.state_dict()
    packed["state"] = {number[id(parameters[name])]: values for name, values in states.items()}
    optimizer.load_state_dict(packed)
