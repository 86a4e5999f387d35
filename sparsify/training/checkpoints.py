"""Folders and files that are there whole or not at all, and that are checked before they are read.

A checkpoint folder is filled beside its place, sealed (``sparsify.seal``), flushed to the disk and renamed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from sparsify.errors import CheckpointError
from sparsify.seal import MANIFEST, check_seal, flush, replaced, seal

__all__ = ["keep_epoch", "kept", "recover", "resumable", "tidy", "write_folder", "write_text"]


def write_text(path: Path, text: str) -> None:
    """``path`` holds ``text`` whole, or what it held before."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """``target`` becomes what ``write`` fills; after a kill at any moment ``recover`` finds the old or the new one."""
    partial, old = _partial(target), replaced(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        seal(partial)
        recover(target)
        if target.exists():
            os.rename(target, old)
        os.rename(partial, target)
        flush(target.parent)
    except (OSError, SafetensorError, CheckpointError) as error:  # a full disk is any of these
        shutil.rmtree(partial, ignore_errors=True)
        recover(target)
        cause = (error.__cause__ if isinstance(error, CheckpointError) else None) or error
        raise CheckpointError(
            f"{target}: cannot be written: {getattr(cause, 'strerror', None) or cause}; what was there is untouched"
        ) from error
    shutil.rmtree(old, ignore_errors=True)


def recover(target: Path) -> bool:
    """Whether ``target`` is there, after a ``write_folder`` that was killed between its two renames, too."""
    old = replaced(target)
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, target)
    return target.exists()


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def tidy(folder: Path) -> None:
    """Recovers the checkpoints of the run folder ``folder`` and removes what killed processes left unfinished."""
    for name in ("last", "best"):
        recover(folder / name)
    for path in folder.glob(".*.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def keep_epoch(run: Path, epoch: int, count: int) -> None:
    """``last/`` of ``run``, which ends the 0-based ``epoch``, stays as ``epoch-<n>/``, with ``count`` - 1 before it.

    The files are shared with ``last/`` until that moves on: no byte is copied.
    """
    if count == 0:
        return
    source, target = run / "last", run / f"epoch-{epoch + 1:03d}"

    def link(folder: Path) -> None:
        for path in source.iterdir():
            if path.name != MANIFEST:
                try:
                    os.link(path, folder / path.name)
                except OSError:  # a file system without links
                    shutil.copy2(path, folder / path.name)

    write_folder(target, link)
    for old in _epochs(run)[count:]:
        shutil.rmtree(old, ignore_errors=True)


def _epochs(run: Path) -> list[Path]:
    """The kept checkpoints of ends of epochs, the newest first."""
    found = [path for path in run.glob("epoch-*") if path.name.removeprefix("epoch-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("epoch-")), reverse=True)


def kept(run: Path) -> str:
    """What is left of a run that has to end, in words."""
    found = [str(run / name) for name in ("last", "best") if (run / name).exists()]
    return f"earlier checkpoints: {', '.join(found)}" if found else "no checkpoint was written before it"


def resumable(run: Path) -> tuple[Path | None, str]:
    """The checkpoint of a tidied run folder to resume from, and what was wrong with newer ones.

    That is ``last/``, or the newest ``epoch-*/`` when ``last/`` is damaged; None when the run has not come to save one.

    Raises:
        CheckpointError: ``last/`` is damaged and no other checkpoint is whole.
    """
    wrong: list[str] = []
    for folder in (run / "last", *_epochs(run)):
        if folder.exists():
            try:
                check_seal(folder)
            except CheckpointError as error:
                wrong.append(str(error))
            else:
                return folder, "; ".join(wrong)
    if wrong:
        raise CheckpointError(wrong[0])
    return None, ""
