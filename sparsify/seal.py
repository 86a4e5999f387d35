"""Seals: folders that can be checked before they are read.

A sealed folder holds ``manifest.json``, size and BLAKE2b digest of every other file: what a broken disk or an
unfinished copy left is found before it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from sparsify.errors import CheckpointError

__all__ = ["MANIFEST", "check_seal", "flush", "is_sealed", "replaced", "seal", "standing"]

MANIFEST = "manifest.json"


def is_sealed(folder: Path) -> bool:
    return (folder / MANIFEST).exists()


def replaced(folder: Path) -> Path:
    """Where ``folder`` is while a newer one takes its place."""
    return folder.with_name(f".{folder.name}.old")


def standing(folder: Path) -> Path:
    """``folder``, or the one before it where a kill, or a process at this moment, is between taking that away and
    giving the newer one its name."""
    return replaced(folder) if not folder.exists() and replaced(folder).exists() else folder


def seal(folder: Path) -> None:
    """Adds the manifest, and has everything reach the disk before the folder gets its name."""
    files = {path.name: {"bytes": path.stat().st_size, "blake2b": _digest(path)} for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"version": 1, "files": files}, indent=1) + "\n", encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        flush(path)


def flush(path: Path) -> None:
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
