"""Measurements of a run as JSON lines and TensorBoard scalars."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.errors import TrainingError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["MetricsLog", "read_metrics"]


class MetricsLog:
    """Appends to ``metrics.jsonl`` and ``tensorboard/`` in ``folder``; with ``enabled=False`` it writes nothing.

    ``keep`` is the length in bytes up to which an earlier file is kept: a run resumed from a checkpoint drops what was
    written after it, since those steps are taken again.
    """

    def __init__(self, folder: Path, *, keep: int = 0, first_step: int = 0, enabled: bool = True) -> None:
        self._file = None
        self._board: SummaryWriter | None = None
        if not enabled:
            return
        path = folder / "metrics.jsonl"
        path.touch()
        os.truncate(path, min(keep, path.stat().st_size))
        self._file = path.open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return  # TensorBoard is optional: the JSON lines hold the same numbers
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step if keep else None)

    @property
    def length(self) -> int:
        """Bytes written so far: what ``keep`` of a resumed run should be."""
        if self._file is None:
            return 0
        self._file.flush()
        return os.fstat(self._file.fileno()).st_size

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line ``{"kind": kind, "step": step, ...}``; a number is also the TensorBoard scalar ``kind/name``."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"kind": kind, "step": step} | values, allow_nan=False) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in values.items():
                    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                        self._board.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:
            raise TrainingError(
                f"{self._file.name}: cannot be written: {error.strerror or error}; --resume goes on from last/"
            ) from error

    def close(self) -> None:
        for part in (self._file, self._board):
            if part is not None:
                with contextlib.suppress(OSError):  # a full disk, which the line that did not fit has spoken of
                    part.close()


def read_metrics(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, all or those of one ``kind`` (``step`` or ``epoch``)."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if kind is None or line["kind"] == kind]
