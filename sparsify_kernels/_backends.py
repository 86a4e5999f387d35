"""Which backend serves which op, and why: loads the compiled kernels, and tells of missing and stale ones.

The compiled kernels are used if they carry the hash of the sources at hand, and if nothing said otherwise:
``SPARSIFY_BACKEND=reference``, read at import, leaves both them and Triton out.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch

from sparsify_kernels import _registry
from sparsify_kernels._build import PACKAGE, WHY_PURE, BuildError, csrc_folder, source_hash

__all__ = ["backend_info", "build_info", "load_extension"]

REBUILD = "`python -m sparsify_kernels.build` builds them"

_reasons: dict[str, str] = {}
_isa: list[str] = []


def load_extension() -> None:
    """Load the compiled CPU kernels, or warn once with the reason why the reference serves the CPU."""
    if _registry.REFERENCE_ONLY:
        _reasons["cpp"] = _reasons["triton"] = "SPARSIFY_BACKEND=reference"
        return
    if not _registry.HAS_TRITON:
        _reasons["triton"] = "triton is not installed"
    elif torch.version.cuda is None and torch.version.hip is None:
        _reasons["triton"] = "this torch is built for the CPU: there is no GPU to run on"
    reason = _load()
    if reason is None:
        return
    _reasons["cpp"] = reason
    warnings.warn(f"sparsify_kernels runs in plain PyTorch on the CPU: {reason}", RuntimeWarning, stacklevel=3)


def _load() -> str | None:
    """Import and register ``_C``; returns why not."""
    try:
        extension = importlib.import_module("sparsify_kernels._C")
    except ModuleNotFoundError:
        return _why_pure()
    except ImportError as error:
        return f"the compiled kernels do not load ({error}); {REBUILD} anew"
    try:
        current = source_hash(csrc_folder())
    except BuildError:
        current = extension.source_hash  # nothing to compare with
    if extension.source_hash != current:
        return f"the compiled kernels are stale: their sources have changed since; {REBUILD} anew"
    extension.register()
    _isa.append(extension.isa)
    return None


def _why_pure() -> str:
    """Why there is no ``_C``: the build left a note, or there was none."""
    note = PACKAGE / WHY_PURE
    reason = note.read_text(encoding="utf-8").strip() if note.exists() else "they were never built"
    return f"the compiled kernels are missing: {reason}; {REBUILD}"


def backend_info() -> dict[str, Any]:
    """Which backend serves each op on each device: ``cpp``, ``triton`` or ``reference`` (every other device, too).

    Returns:
        ``{op: {"cpu": backend, "cuda": backend}, ..., "reasons": {backend: why it is off}, "isa": name}``; ``isa`` is
        the instruction set of the C++ kernels (``avx512``, ``avx2``, ``base``), None without them.

    >>> from sparsify_kernels import backend_info
    >>> sorted(backend_info()["random_mask"])
    ['cpu', 'cuda']
    """
    info: dict[str, Any] = {
        op: {
            "cpu": "cpp" if _registry.has_cpp(op) else "reference",
            "cuda": "triton" if _registry.has_triton(op) else "reference",
        }
        for op in _registry.TO_COME
        if _registry.kernels_of(op)
    }
    info["reasons"] = dict(_reasons)
    info["isa"] = _isa[0] if _isa else None
    return info


def build_info() -> dict[str, Any]:
    """Compiler, flags, CPU features and threads of the compiled kernels; empty without the optional ``_info``."""
    try:
        module = importlib.import_module("sparsify_kernels._info")
    except ImportError:
        return {}
    return {
        "compiler": module.compiler,
        "flags": module.flags,
        "cpu": module.cpu_features(),
        "isa": module.isa(),
        "threads": module.threads(),
        "torch_threads": torch.get_num_threads(),
    }
