"""The registry: how an op lands, and which rungs of the ladder it has.

An op lives in ``sparsify_kernels/<op>/``: ``reference.py`` (plain PyTorch, any device, any float), ``triton.py``
(CUDA and ROCm) and ``op.py`` (the public function, the schemas, the fakes, the gradients); its CPU kernels are in
``csrc/<op>.cpp``. ``random_mask`` is the pattern:

1. *Schema*, owned here: ``define(kernel, signature, reference=..., fake=...)`` creates
   ``torch.ops.sparsify_kernels.<kernel>``. An op that is differentiated has a second kernel, ``<op>_backward``,
   defined the same way.
2. *Backends.* The reference serves every device. If ``<op>/triton.py`` exists, its function called ``<kernel>``
   serves CUDA; it is imported at its first call. If the compiled extension registered ``<kernel>``, that serves the
   CPU. All have the signature of the schema, so a test swaps one for another: ``implementations(kernel)``.
3. *Fake*: allocates exactly what the kernels allocate: ``x.new_empty(shape)``, never ``empty_like``.
4. *Gradient*: ``differentiate(kernel, backward, setup)``; ``backward(ctx, *grads)`` calls the ``_backward`` kernel
   and honours ``ctx.needs_input_grad``; saved tensors are never written. A backward without a gradient of its own
   says so: ``refuse_second_derivative(kernel)``.
5. *Values* are checked inside the kernels: ``if check_values(x.device): ...; raise InvalidValue(text)`` in Python,
   ``throw std::runtime_error(text)`` in C++. The text starts with ``<op>: ``. The public function calls
   ``_checks.call(op, ...)``, which turns it into a ``ValueError``.
6. ``TO_COME`` lists, per op, the rungs that are still missing. ``missing(op)`` says which are: a test fails when the
   two differ.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "NAMESPACE",
    "RUNGS",
    "TO_COME",
    "define",
    "differentiate",
    "implementations",
    "kernels_of",
    "missing",
    "refuse_second_derivative",
]

NAMESPACE = "sparsify_kernels"
RUNGS = ("reference", "fake", "backward", "cpp", "triton", "test", "benchmark", "docs")

# Rungs still to come. An op without a line here does not exist.
TO_COME: dict[str, tuple[str, ...]] = {
    "random_mask": (),
    "attention_scores": (),
    "key_tokens": (),
    "merge_tokens": (),
    "window_attention": (),
}

# Ops whose results are indices: nothing to differentiate.
WITHOUT_GRADIENT = frozenset({"key_tokens"})

_PACKAGE = Path(__file__).parent
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_references: dict[str, Callable[..., Any]] = {}
_differentiable: set[str] = set()

REFERENCE_ONLY = os.environ.get("SPARSIFY_BACKEND") == "reference"
HAS_TRITON = importlib.util.find_spec("triton") is not None


def define(
    kernel: str, signature: str, *, reference: Callable[..., Any], fake: Callable[..., Any]
) -> torch._ops.OpOverload:
    """Create ``torch.ops.sparsify_kernels.<kernel>`` with ``signature``, its reference and fake, and Triton where
    there is some."""
    _LIBRARY.define(kernel + signature, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(kernel, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{kernel}", fake, lib=_LIBRARY)
    if HAS_TRITON and not REFERENCE_ONLY and (_PACKAGE / op_of(kernel) / "triton.py").exists():
        _LIBRARY.impl(kernel, _triton_on_first_call(kernel), "CUDA")
    _references[kernel] = reference
    return getattr(getattr(torch.ops, NAMESPACE), kernel).default


def differentiate(kernel: str, backward: Callable[..., Any], setup: Callable[..., Any]) -> None:
    """Give ``kernel`` its gradient, as ``torch.library.register_autograd`` takes it."""
    torch.library.register_autograd(f"{NAMESPACE}::{kernel}", backward, setup_context=setup, lib=_LIBRARY)
    _differentiable.add(kernel)


def refuse_second_derivative(kernel: str) -> None:
    """Differentiating ``kernel``, the backward of an op, raises ``NotImplementedError``."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing to keep."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(f"{op_of(kernel)}: second derivatives are not implemented")

    differentiate(kernel, backward, setup)


def op_of(kernel: str) -> str:
    """The op that a kernel belongs to: ``random_mask`` for ``random_mask_backward``."""
    return max((op for op in TO_COME if kernel == op or kernel.startswith(op + "_")), key=len)


def kernels_of(op: str) -> list[str]:
    """The dispatcher ops of ``op``: itself and its backward."""
    return [k for k in _references if op_of(k) == op]


def has_cpp(kernel: str) -> bool:
    """Whether the loaded extension serves ``kernel`` on the CPU."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{kernel}", "CPU"))


def has_triton(kernel: str) -> bool:
    """Whether Triton serves ``kernel`` on CUDA."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{kernel}", "CUDA"))


def implementations(kernel: str) -> dict[str, Callable[..., Any]]:
    """Every implementation of ``kernel`` by backend name, each callable with the arguments of the schema.

    ``cpp`` takes CPU tensors; ``triton`` CUDA tensors, or CPU tensors under ``TRITON_INTERPRET=1``.
    """
    found = {"reference": _references[kernel]}
    if has_cpp(kernel):
        found["cpp"] = getattr(getattr(torch.ops, NAMESPACE), kernel).default
    if has_triton(kernel):
        found["triton"] = _triton_on_first_call(kernel)
    return found


def missing(op: str, root: Path) -> set[str]:
    """The rungs that ``op`` lacks in the source tree at ``root``."""
    kernels = kernels_of(op)
    present = {
        "reference": bool(kernels) and (_PACKAGE / op / "reference.py").exists(),
        "fake": bool(kernels),  # define() takes none without
        "backward": op in _differentiable or (op in WITHOUT_GRADIENT and bool(kernels)),
        "cpp": (root / "csrc" / f"{op}.cpp").exists(),
        "triton": (_PACKAGE / op / "triton.py").exists(),
        "test": any((root / "tests" / NAMESPACE / op).glob("test_*.py")),
        "benchmark": (root / "benchmarks" / f"test_{op}.py").exists(),
        "docs": f"\n| `{op}` |" in (root / "docs" / "ops.md").read_text(encoding="utf-8"),
    }
    return {rung for rung in RUNGS if not present[rung]}


def _triton_on_first_call(kernel: str) -> Callable[..., Any]:
    """Triton's function for ``kernel``, imported when called: importing Triton takes longer than importing this
    package. Triton launches on the current device: here that of the first tensor."""

    def triton_kernel(*args: Any) -> Any:
        run = getattr(importlib.import_module(f"{NAMESPACE}.{op_of(kernel)}.triton"), kernel)
        with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, torch.Tensor))):
            return run(*args)

    return triton_kernel
