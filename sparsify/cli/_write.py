"""Files that the commands write: whole or not at all, with an error that names the option."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from sparsify.errors import UsageError

__all__ = ["check_writable", "write_json"]


def check_writable(path: Path | None, option: str, suffixes: tuple[str, ...] = ()) -> None:
    """``UsageError`` unless ``path`` is None or a file name in an existing folder; asked before the work starts."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{option} {path}: is a folder; expected a file name")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: the folder {path.parent} does not exist")
    if suffixes and path.suffix not in suffixes:
        raise UsageError(f"{option} {path}: expected a file name that ends in {' or '.join(suffixes)}")


def write_json(path: Path, data: Any, option: str) -> None:
    """``data`` as JSON in ``path``."""
    check_writable(path, option)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
