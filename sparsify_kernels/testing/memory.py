"""Memory that tells on a kernel: allocations full of NaN, tensors with sentinels around them or nothing after them, and
the peak."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = [
    "Guarded",
    "at_the_edge",
    "guarded",
    "guarded_memory",
    "peak_memory",
    "peak_of_tensors",
    "poisoned_memory",
]

T = TypeVar("T")

MARGIN = 64  # elements on either side


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, ``torch.empty`` and its kin, in C++ too, hand out NaN (the largest value for integers, True for bool):
    what a kernel forgets to write shows.

    PyTorch does this with deterministic algorithms on, so they are on as well; both are as before afterwards.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


class Guarded(NamedTuple):
    """A tensor in the middle of a larger buffer; see ``guarded``."""

    tensor: Tensor
    buffer: Tensor

    def check(self) -> None:
        """Raises ``AssertionError`` if something wrote next to the tensor."""
        expected = _sentinel(self.buffer.dtype)
        for where, part in (("before", self.buffer[:MARGIN]), ("after", self.buffer[-MARGIN:])):
            intact = part.isnan().all() if isinstance(expected, float) else (part == expected).all()
            if not bool(intact):
                raise AssertionError(f"something wrote {where} the tensor")


@contextlib.contextmanager
def guarded_memory(fill: float = math.nan) -> Iterator[None]:
    """Inside, ``Tensor.new_empty`` puts sentinels on both sides of what it hands out, and fills it with them too, but
    floats with ``fill``; at the end ``AssertionError`` if something wrote next to one: a kernel whose outputs were
    allocated in Python.
    """
    real, given = Tensor.new_empty, []

    def new_empty(self: Tensor, *size: Any, **kwargs: Any) -> Tensor:
        plain = real(self, *size, **kwargs)
        if not plain.numel():
            return plain
        given.append(guarded(torch.full_like(plain, fill if plain.is_floating_point() else _sentinel(plain.dtype))))
        return given[-1].tensor

    Tensor.new_empty = new_empty  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Tensor.new_empty = real  # type: ignore[method-assign]
    for guard in given:
        guard.check()


def peak_memory(function: Callable[[], T]) -> tuple[int, T]:
    """By how many bytes the memory of this process grew while ``function`` ran, at its peak, and its result.

    Linux only: there the kernel keeps the peak, and forgets it when asked to. Call it in a process of its own: memory
    that an earlier allocation left behind in the allocator would be used again, unseen.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    result = function()
    return _status("VmHWM") - before, result


def peak_of_tensors(function: Callable[[], T]) -> tuple[int, T]:
    """The most bytes that tensors made by ``function`` took at once, in CPU memory, and its result.

    What PyTorch's allocator gave out, as ``torch.cuda.max_memory_allocated`` counts it on a GPU: not what kernels and
    libraries take for themselves, nor what the allocator keeps back. Those are in ``peak_memory``.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, result


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def guarded(x: Tensor) -> Guarded:
    """A contiguous copy of ``x`` with sentinels (NaN; -77 or 77 for integers) on both sides.

    As an input it shows reads out of bounds (NaN in the result), as an output buffer writes out of bounds
    (``check()``).
    """
    buffer = torch.full((x.numel() + 2 * MARGIN,), _sentinel(x.dtype), dtype=x.dtype, device=x.device)
    inside = buffer[MARGIN : MARGIN + x.numel()].view(x.shape)
    inside.copy_(x)
    return Guarded(inside, buffer)


def at_the_edge(x: Tensor) -> Tensor:
    """A contiguous copy of ``x``, in CPU memory, right before a page that nobody may touch: a kernel that reads or
    writes just behind it is killed (SIGSEGV), whatever it does with what it read. Linux only.
    """
    size = x.numel() * x.element_size()
    room = (size // mmap.PAGESIZE + 1) * mmap.PAGESIZE
    buffer = torch.frombuffer(mmap.mmap(-1, room + mmap.PAGESIZE), dtype=torch.uint8)  # keeps the pages while it lives
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(buffer.data_ptr() + room), mmap.PAGESIZE, 0):  # PROT_NONE
        raise OSError(ctypes.get_errno(), "at_the_edge: mprotect")
    inside = buffer[room - size : room].view(x.dtype).view(x.shape)
    return inside.copy_(x)


def _sentinel(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    if dtype.is_floating_point:
        return float("nan")
    return -77 if dtype.is_signed else 77
