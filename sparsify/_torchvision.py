"""Make ``import torchvision`` work where its compiled library cannot be loaded.

timm needs torchvision, and so do parts of transformers (CLAP among them). torchvision's wheel on PyPI is built for
CUDA: beside a CPU build of torch its library does not load, and then ``import torchvision`` itself dies with "operator
torchvision::nms does not exist", because it registers a fake kernel for an operator that nobody has declared. Declaring
the two operators is enough: nothing here calls them, and calling them still fails with a clear error.

``ensure_torchvision()`` goes before the first import of timm or transformers. Where the library loads, it changes
nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

__all__ = ["ensure_torchvision"]

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: list[object] = []  # torch.library handles: a declaration lives as long as its handle


def ensure_torchvision() -> bool:
    """Declare torchvision's operators if, and only if, its compiled library cannot be loaded.

    Returns whether they are declared here (``False``: torchvision is absent, works by itself or was imported before).
    """
    if _declared:
        return True
    if "torchvision" in sys.modules:
        return False
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return False
    if _library_loads(Path(spec.submodule_search_locations[0])):
        return False

    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + schema)
    _declared.append(library)
    return True


def _library_loads(package: Path) -> bool:
    import torch

    for path in sorted([*package.glob("_C*.so"), *package.glob("_C*.pyd")]):
        try:
            torch.ops.load_library(str(path))
        except OSError:  # built for another torch, or for CUDA beside a CPU torch
            continue
        return True
    return False
