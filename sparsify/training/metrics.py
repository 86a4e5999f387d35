"""Measurements of a run as JSON lines and TensorBoard scalars."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.errors import CheckpointError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["MetricsLog", "read_metrics"]


class MetricsLog:
    """Appends to ``metrics.jsonl`` and ``tensorboard/`` in ``folder``; with ``enabled=False`` it writes nothing.

    ``keep`` is the length in bytes up to which an earlier file is kept: a run resumed from a checkpoint drops what was
    written after it, since those steps are taken again.

    A line that the disk has no room for waits, and is written with the next one.
    """

    def __init__(self, folder: Path, *, keep: int = 0, first_step: int = 0, enabled: bool = True) -> None:
        self._file: int | None = None
        self._board: SummaryWriter | None = None
        self._waiting = b""
        if not enabled:
            return
        self._path = folder / "metrics.jsonl"
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        self._length = min(keep, os.fstat(self._file).st_size)
        os.truncate(self._file, self._length)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return  # TensorBoard is optional: the JSON lines hold the same numbers
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step if keep else None)

    @property
    def length(self) -> int:
        """Bytes written so far: what ``keep`` of a resumed run should be.

        Raises ``CheckpointError`` while a line waits for room: a run resumed from here would have lost it.
        """
        if self._file is None:
            return 0
        if error := self._flush():
            raise CheckpointError(f"{self._path}: cannot be written: {_reason(error)}") from error
        return self._length

    def write(self, kind: str, step: int, values: dict[str, Any]) -> str:
        """One line ``{"kind": kind, "step": step, ...}``; a number is also the TensorBoard scalar ``kind/name``.

        Returns what is wrong, if lines begin to wait with this one.
        """
        if self._file is None:
            return ""
        first = not self._waiting
        self._waiting += (json.dumps({"kind": kind, "step": step} | values, allow_nan=False) + "\n").encode()
        error = self._flush()
        if self._board is not None:
            try:
                for name, value in values.items():
                    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                        self._board.add_scalar(f"{kind}/{name}", value, step)
            except OSError:  # of its writing thread, some time ago
                self._leave_board()  # the JSON lines hold the same numbers
        return f"{self._path}: cannot be written: {_reason(error)}; its lines wait for room" if error and first else ""

    def _flush(self) -> OSError | None:
        """Write what waits, whole or not at all; why not, if not."""
        assert self._file is not None
        done = 0
        try:
            while done < len(self._waiting):
                done += os.pwrite(self._file, self._waiting[done:], self._length + done)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self._file, self._length)
            return error
        self._length, self._waiting = self._length + done, b""
        return None

    def _leave_board(self) -> None:
        board, self._board = self._board, None
        if board is not None:
            with contextlib.suppress(OSError):
                board.close()

    def close(self) -> None:
        self._leave_board()
        if self._file is not None:
            self._flush()
            os.close(self._file)
            self._file = None


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def read_metrics(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, all or those of one ``kind`` (``step`` or ``epoch``)."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if kind is None or line["kind"] == kind]
