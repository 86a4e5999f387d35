"""What a profile says about the ops of this package: which ran, in which order, and what they called on the way."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsify_kernels._registry import NAMESPACE

__all__ = ["MEMORY_OPS", "RecordedOps", "Traced", "traced"]

# What a kernel written in C++ or Triton leaves in a trace: outputs, zeros, copies of inputs in another layout.
MEMORY_OPS = frozenset(
    f"aten::{name}"
    for name in (
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "contiguous", "clone", "copy_",
        "zero_", "fill_", "resize_", "as_strided",
    )
)  # fmt: skip


class RecordedOps(TorchDispatchMode):
    """``with RecordedOps() as ops: ...``: ``ops.names`` are the operations that reached the dispatcher, in order, as
    ``aten::new_empty``; ``ops.largest`` is how many elements the largest tensor has that one of them returned."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name().split(".")[0])
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


class Traced(NamedTuple):
    """One call of a kernel, as profiled."""

    kernel: str
    """``merge_tokens_backward``, say."""
    inside: tuple[str, ...]
    """The operations it called: ``aten::new_empty``, ..."""
    largest: int
    """Bytes of its largest allocation, as far as they came from torch; with ``profile_memory=True``."""

    @property
    def fused(self) -> bool:
        """Whether it computed by itself: the reference calls ``aten::matmul``, ``aten::sort`` and the like."""
        return set(self.inside) <= MEMORY_OPS


def traced(profile: Any) -> list[Traced]:
    """The calls of kernels of this package in a ``torch.profiler.profile``, in order."""
    calls = []
    for event in profile.events():
        namespace, _, kernel = event.name.partition("::")
        if namespace == NAMESPACE:
            below = _below(event)
            names = tuple(e.name for e in below if e.name.startswith("aten::"))
            calls.append(Traced(kernel, names, max((e.self_cpu_memory_usage for e in below), default=0)))
    return calls


def _below(event: Any) -> list[Any]:
    found = []
    for child in event.cpu_children:
        found += [child, *_below(child)]
    return found
