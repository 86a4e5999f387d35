"""Argument checks shared by the ops: one place for the wording of errors.

Shapes, dtypes and devices are checked in the public functions (``TypeError``/``ValueError``, under fake tensors too):
``Arguments`` binds the sizes of one call by name, so that ``"B N D"`` and then ``"B N d"`` require equal B and N.
Values are checked inside the ops' CPU kernels, which raise ``InvalidValue`` (Python) or ``std::runtime_error`` with
the same text (C++); on a GPU only when ``check_values()`` says so.
"""

from __future__ import annotations

import os

import torch

__all__ = ["FLOATS", "Arguments", "InvalidValue", "call", "check_values", "describe"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_CHECK_ON_GPU = os.environ.get("SPARSIFY_CHECK") == "1"


class InvalidValue(ValueError, RuntimeError):  # noqa: N818
    """A value out of range, found inside an op: ``ValueError`` to eager callers, ``RuntimeError`` to compiled ones."""


def check_values(device: torch.device) -> bool:
    """Whether an op on ``device`` checks values: always on the CPU; elsewhere only with ``SPARSIFY_CHECK=1``, which
    syncs."""
    return device.type == "cpu" or _CHECK_ON_GPU


def call(op: torch._ops.OpOverload, *args: object, name: str | None = None):  # type: ignore[no-untyped-def]  # whatever the op returns
    """Call a dispatcher op; eagerly, the ``RuntimeError`` of a C++ value check becomes the ``ValueError`` of the
    contract.

    Value checks are recognised by their text, which starts with the name of the public function: that of the op, if
    no other ``name`` is given.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        if isinstance(error, ValueError) or not str(error).startswith(f"{name or op._opname}: "):
            raise
        raise InvalidValue(str(error)) from None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(value: object) -> str:
    """What came, as errors say it: ``int32 [2, 7]`` for a tensor, plain values as they print, else the type's name."""
    if isinstance(value, torch.Tensor):
        return f"{dtype_name(value.dtype)} [{', '.join(str(s) for s in value.shape)}]"
    plain = isinstance(value, (bool, int, float, str, tuple, torch.SymInt, torch.SymFloat)) or value is None
    return repr(value) if plain else type(value).__name__


class Arguments:
    """The tensor arguments of one call, checked one after the other; sizes are bound by name at their first use.

        args = Arguments("merge_tokens")
        args.tensor("x", x, "B N D", FLOATS)
        args.tensor("metric", metric, "B N d", FLOATS)
        args.tensor("keys.index", keys.index, "B K", (torch.int64,))

    ``sizes`` holds the bound sizes; ``device`` is that of the first tensor, and every later one must be on it.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, int] = {}
        self.device: torch.device | None = None
        self._first = ""

    def tensor(self, name: str, value: object, shape: str, dtypes: tuple[torch.dtype, ...] | None = None) -> None:
        """Require a tensor of ``shape`` (names, or numbers for fixed sizes) and one of ``dtypes`` (None: any).

        ``TypeError`` for no tensor or another dtype, ``ValueError`` for another rank, size or device.
        """
        axes = shape.split()
        expected = f"[{', '.join(axes)}]"
        if dtypes is not None:
            expected = f"{' or '.join(dtype_name(d) for d in dtypes)} {expected}"
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{self.op}: {name} must be a tensor, {expected}, got {describe(value)}")
        if dtypes is not None and value.dtype not in dtypes:
            raise TypeError(f"{self.op}: {name} must be {expected}, got {describe(value)}")
        if value.dim() != len(axes):
            raise ValueError(f"{self.op}: {name} must be {expected}, got {describe(value)}")
        for axis, size in zip(axes, value.shape, strict=True):
            bound = int(axis) if axis.isdigit() else self.sizes.setdefault(axis, size)
            if size != bound:
                where = "" if axis.isdigit() else f" with {axis} = {bound}"
                raise ValueError(f"{self.op}: {name} must be {expected}{where}, got {describe(value)}")
        if self.device is None:
            self.device, self._first = value.device, name
        elif value.device != self.device:
            raise ValueError(f"{self.op}: {name} must be on {self.device} like {self._first}, got {value.device}")

    def same_dtype(self, name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
        """``TypeError`` unless ``value`` has the dtype of ``other``."""
        if value.dtype != other.dtype:
            expected, got = dtype_name(other.dtype), describe(value)
            raise TypeError(f"{self.op}: {name} must be {expected} like {other_name}, got {got}")

    def require(self, ok: bool, name: str, expected: str, value: object) -> None:
        """``ValueError`` unless ``ok``: ``op: name must be expected, got value``.

        ``expected`` is plain text and ``value`` as it came: formatting a symbolic size before it is needed breaks
        ``torch.compile``.
        """
        if not ok:
            raise ValueError(f"{self.op}: {name} must be {expected}, got {describe(value)}")
