"""Decoded clips on disk: one safetensors file a clip, read by mapping it into memory.

A file holds the six tensors of ``Clip`` as they are, frames in unit-major order: a mask unit is one run of bytes, so a
reader that takes some units touches no others, and all processes that read a clip share one copy in memory.

**Key.** A clip's name is the hash of the video's *content* and of every setting that shapes the clip: a renamed or
copied video hits, a changed one misses, several configurations share a folder. So that a hit need not read the video
again, a small file in ``seen/`` remembers the content hash of each path, size and modification time.

**Safety.** Files are written beside their final name and moved there at once, so any number of threads and processes
may share a folder: the last writer wins, with the same bytes. A file that is cut short or damaged (its checksums say so
when a process first opens it) is a miss and is written again.

    FOLDER/clips/ab/<content>-<settings>.safetensors      FOLDER/seen/cd/<path, size, time>
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import secrets
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save

from sparsify.batch import Clip
from sparsify.config import Config
from sparsify.data.media import read_clip
from sparsify.errors import MediaError, SparsifyError

__all__ = ["ClipCache"]

_LAYOUT = 1  # of the files, and of what ``read_clip`` gives for the same settings: raised when either changes
_BLOCK = 1 << 20
_HEX = 40  # digits of a hash in a name: 160 bits


class _Seen(NamedTuple):
    """A clip this process has opened, and the video it was made of."""

    size: int
    modified: int  # ns
    clip: Clip


class ClipCache:
    """Clips of one configuration in a folder, which is made where it does not exist.

    Picklable, and cheap to send to a worker: only the folder and the configuration travel.

    Raises:
        SparsifyError: the folder cannot be made or written to; names it and the reason.
    """

    def __init__(self, folder: str | os.PathLike[str], config: Config) -> None:
        self.folder = Path(folder)
        self.config = config
        self._settings = _settings_key(config)
        self._open: dict[str, _Seen] = {}
        try:
            (self.folder / "clips").mkdir(parents=True, exist_ok=True)
            (self.folder / "seen").mkdir(exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def get(self, path: str | Path, *, threads: int = 0) -> Clip:
        """The clip of the video at ``path``: from memory, from the folder, or decoded and written to it.

        The tensors may be mapped from the file: copy before writing into them. ``threads`` as in ``read_clip``.

        Raises:
            MediaError: the video cannot be read (nothing is cached then).
            SparsifyError: the cache cannot be written.
        """
        name = os.path.abspath(path)
        size, modified = _stat(path)
        seen = self._open.get(name)
        if seen is not None and (seen.size, seen.modified) == (size, modified):
            return seen.clip
        note = self._note(name, size, modified)
        content = _read_text(note) or _content_key(path)
        file = self._file(content)
        clip = _load(file, verify=True)
        if clip is None:
            # The note may be of a video that was replaced within one tick of the clock: look again before decoding.
            file = self._file(content := _content_key(path))
            clip = _load(file, verify=True)
        if clip is None:
            clip = read_clip(path, self.config, threads=threads)
            self._write(file, _serialised(clip))
            clip = _load(file, verify=False) or clip
        if _read_text(note) != content:
            self._write(note, content.encode())
        self._open[name] = _Seen(size, modified, clip)
        return clip

    def has(self, path: str | Path) -> bool:
        """Whether ``get`` would find the clip without decoding (its checksums aside). ``MediaError`` for a missing
        video.
        """
        size, modified = _stat(path)
        content = _read_text(self._note(os.path.abspath(path), size, modified))
        return content is not None and _load(self._file(content), verify=False) is not None

    def _file(self, content: str) -> Path:
        return self.folder / "clips" / content[:2] / f"{content}-{self._settings}.safetensors"

    def _note(self, name: str, size: int, modified: int) -> Path:
        digest = hashlib.blake2b(f"{size} {modified} {name}".encode(errors="surrogateescape")).hexdigest()[:_HEX]
        return self.folder / "seen" / digest[:2] / digest

    def _write(self, file: Path, data: bytes) -> None:
        """Put ``data`` at ``file`` whole or not at all."""
        part = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            file.parent.mkdir(exist_ok=True)
            try:
                part.write_bytes(data)
                os.replace(part, file)
            except BaseException:
                with contextlib.suppress(OSError):
                    part.unlink()
                raise
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> SparsifyError:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        return SparsifyError(f"{self.folder}: cannot write the clip cache: {reason}")


def _stat(path: str | Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise MediaError(f"{path}: cannot read the video: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


def _content_key(path: str | Path) -> str:
    """A hash of the whole file."""
    digest = hashlib.blake2b()
    try:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise MediaError(f"{path}: cannot read the video: {error.strerror}") from error
    return digest.hexdigest()[:_HEX]


def _settings_key(config: Config) -> str:
    """A hash of what decides a clip's content: how it is sampled, and the geometry of its images."""
    vision, audio = config.vision, config.audio
    settings = {
        "layout": _LAYOUT,
        "clip": dataclasses.asdict(config.clip),
        "vision": [vision.image_size, vision.unit],
        "audio": [audio.spec_size, audio.mel_bins, audio.unit],
    }
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _serialised(clip: Clip) -> bytes:
    tensors = {name: value.contiguous() for name, value in clip._asdict().items()}
    return save(tensors, {"crc32": _checksums(tensors)})  # one entry: the order of several changes from file to file


def _load(file: Path, *, verify: bool) -> Clip | None:
    """The clip in ``file``, mapped; None when there is none or it is damaged."""
    try:
        with safetensors.safe_open(file, "pt") as opened:
            checksums = (opened.metadata() or {}).get("crc32")
            tensors = {name: opened.get_tensor(name) for name in Clip._fields}
    except (OSError, safetensors.SafetensorError, RuntimeError):
        return None  # a RuntimeError: the file went away between reading its header and torch's mapping it
    if verify and checksums != _checksums(tensors):
        return None
    return Clip(**tensors)


def _checksums(tensors: dict[str, torch.Tensor]) -> str:
    return " ".join(str(zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data)) for name in Clip._fields)


def _read_text(file: Path) -> str | None:
    """The hash in a note; None when there is no (whole) one."""
    try:
        text = file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    return text if len(text) == _HEX and not set(text) - set("0123456789abcdef") else None
