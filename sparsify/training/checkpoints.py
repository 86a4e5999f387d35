"""Folders and files that are there whole or not at all, and that are checked before they are read.

A checkpoint folder is filled beside its place, sealed, flushed to the disk and renamed. Its seal, ``manifest.json``,
holds size and BLAKE2b digest of every file: what a broken disk or an unfinished copy left is found before it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from sparsify.errors import CheckpointError

__all__ = ["check_seal", "keep_epoch", "kept", "recover", "resumable", "tidy", "write_folder", "write_text"]

MANIFEST = "manifest.json"


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
    partial, old = _partial(target), _old(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        _seal(partial)
        recover(target)
        if target.exists():
            os.rename(target, old)
        os.rename(partial, target)
        _flush(target.parent)
    except (OSError, SafetensorError, CheckpointError) as error:  # a full disk is any of these
        shutil.rmtree(partial, ignore_errors=True)
        recover(target)
        cause = error.__cause__ if isinstance(error, CheckpointError) else error
        raise CheckpointError(
            f"{target}: cannot be written: {getattr(cause, 'strerror', None) or cause}; what was there is untouched"
        ) from error
    shutil.rmtree(old, ignore_errors=True)


def recover(target: Path) -> bool:
    """Whether ``target`` is there, after a ``write_folder`` that was killed between its two renames, too."""
    old = _old(target)
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, target)
    return target.exists()


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def tidy(folder: Path) -> None:
    """Recovers the checkpoints of the run folder ``folder`` and removes what killed processes left unfinished."""
    for name in ("last", "best"):
        recover(folder / name)
    for path in folder.glob(".*.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _seal(folder: Path) -> None:
    """Adds the manifest, and has everything reach the disk before the folder gets its name."""
    files = {path.name: {"bytes": path.stat().st_size, "blake2b": _digest(path)} for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"version": 1, "files": files}, indent=1) + "\n", encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_seal(folder: Path) -> None:
    """``CheckpointError`` names the first file of ``folder`` that is not as it was written."""
    manifest = folder / MANIFEST
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        wanted = {name: (entry["bytes"], entry["blake2b"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{manifest}: missing; this checkpoint is not whole") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{manifest}: expected the sizes and digests of the checkpoint's files") from None
    for name, (size, digest) in wanted.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; this checkpoint is not whole")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path}: has {path.stat().st_size:,} bytes, was written with {size:,}")
        if _digest(path) != digest:
            raise CheckpointError(f"{path}: is not what was written (BLAKE2b {_digest(path)}, expected {digest})")


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
    return sorted(run.glob("epoch-[0-9]*"), key=lambda path: path.name, reverse=True)


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
