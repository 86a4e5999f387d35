"""Assertions about results: accuracy against an oracle, assignments, independence of batch-mates, compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["assert_accurate", "assert_alone", "assert_assignment", "assert_compiles", "assert_same", "compiled_anew"]


def assert_accurate(ours: Tensor, *, eager: Tensor, truth: Tensor, factor: float = 2.0, what: str = "result") -> None:
    """Our largest error is at most ``factor`` times PyTorch's, both against ``truth``, plus one rounding step.

        max |ours - truth| <= factor * max |eager - truth| + eps * max |truth|

    Args:
        ours: the result under test. eager: PyTorch's, computed at the dtype of the inputs. truth: fp64.
    """
    if ours.shape != truth.shape:
        raise AssertionError(f"{what}: shape {list(ours.shape)}, the truth has {list(truth.shape)}")
    if truth.numel() == 0:
        return
    truth = truth.to(torch.float64)
    step = torch.finfo(ours.dtype).eps * truth.abs().max()
    error = (ours.to(torch.float64) - truth).abs().max()
    allowed = factor * (eager.to(torch.float64) - truth).abs().max() + step
    if not bool(error <= allowed):  # NaN fails too
        raise AssertionError(f"{what}: largest error {error.item():.3e}, allowed {allowed.item():.3e}")


def assert_same(one: Any, other: Any, what: str = "result") -> None:
    """Equal in structure, dtype, shape and every bit's meaning (NaN equals NaN)."""
    if isinstance(one, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            raise AssertionError(f"{what}: {one.dtype} {list(one.shape)} against {other.dtype} {list(other.shape)}")
        if not torch.equal(torch.nan_to_num(one, nan=1234.5), torch.nan_to_num(other, nan=1234.5)):
            raise AssertionError(f"{what}: values differ, {int((one != other).sum())} of {one.numel()}")
    elif isinstance(one, tuple):
        names = getattr(one, "_fields", range(len(one)))
        if len(one) != len(other):
            raise AssertionError(f"{what}: {len(one)} against {len(other)} parts")
        for name, a, b in zip(names, one, other, strict=True):
            assert_same(a, b, f"{what}.{name}")
    elif one != other:
        raise AssertionError(f"{what}: {one!r} against {other!r}")


def assert_alone(function: Callable[..., Any], inputs: dict[str, Any], what: str = "result") -> None:
    """Each sample's result is the same, bit for bit, with its batch-mates and alone.

    ``inputs`` are keyword arguments; every tensor among them, inside tuples too, has the samples along its first axis.
    """
    together = function(**inputs)
    batch = next(t.shape[0] for t in inputs.values() if isinstance(t, Tensor))
    for b in range(batch):
        # A copy: alone, a sample lies at the start of its memory, and rounding must not depend on alignment either.
        alone = function(**{name: _sample(value, b) for name, value in inputs.items()})
        assert_same(alone, _sample(together, b), f"{what} of sample {b}")


def assert_assignment(
    assign: Tensor, metric: Tensor, index: Tensor, count: Tensor, valid: Tensor | None = None
) -> None:
    """Every valid token joined a key as similar as its most similar one, to within the rounding of fp32; a key joined
    itself.

    For metrics whose dot products are not exact, where two correct backends may break a near-tie differently.
    """
    batch, tokens = assign.shape
    for b in range(batch):
        key = index[b, : int(count[b])]
        inside = torch.ones(tokens, dtype=torch.bool) if valid is None else valid[b].cpu()
        rows = metric[b].to(torch.float64).cpu()[inside]
        slots = assign[b].cpu()[inside]
        if not bool((assign[b].cpu()[~inside] == -1).all()):
            raise AssertionError(f"sample {b}: an invalid token is assigned")
        if len(slots) == 0:
            continue
        if not bool(((slots >= 0) & (slots < len(key))).all()):
            raise AssertionError(f"sample {b}: a valid token is in no live slot")
        named = metric[b].to(torch.float64).cpu()[key.cpu()]
        similarity = rows @ named.T
        bound = rows.abs() @ named.abs().T * metric.shape[2] * torch.finfo(torch.float32).eps
        reached = similarity.gather(1, slots[:, None])[:, 0]
        best = similarity.max(dim=1).values
        is_key = torch.isin(inside.nonzero()[:, 0], key.cpu())
        if not bool(((reached >= best - bound.max(dim=1).values) | is_key).all()):
            raise AssertionError(f"sample {b}: a token joined a key that is not its most similar one")
        own = assign[b].cpu()[key.cpu()]
        if not torch.equal(own, torch.arange(len(key))):
            raise AssertionError(f"sample {b}: a key did not join itself")


def compiled_anew(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` under ``torch.compile``, as if nothing had been compiled before: for errors that it has to raise, which
    ``fullgraph=True`` would wrap in one of its own.
    """
    torch._dynamo.reset()
    return torch.compile(call, backend="eager")


def assert_compiles(
    function: Callable[..., Any], *args: Any, dynamic: bool | None = None, backend: str = "inductor", **kwargs: Any
) -> None:
    """``torch.compile(fullgraph=True)`` gives what eager gives, bit for bit: results, and the gradients of every
    tensor that requires one.

    A graph break raises. Results that are floats and require a gradient are summed, squared, into the loss.
    """
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    leaves = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
    expected, expected_grads = _run(function, leaves, args, kwargs)
    got, got_grads = _run(compiled, leaves, args, kwargs)
    assert_same(got, expected, "compiled result")
    assert_same(got_grads, expected_grads, "compiled gradient")


def _run(function: Callable[..., Any], leaves: list[Tensor], args: Any, kwargs: Any) -> tuple[Any, tuple[Any, ...]]:
    result = function(*args, **kwargs)
    parts = result if isinstance(result, tuple) else (result,)
    loss = sum(p.square().sum() for p in parts if isinstance(p, Tensor) and p.requires_grad)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True) if isinstance(loss, Tensor) and leaves else ()
    return _detached(result), grads


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(_detached(v) for v in value)
    return value


def _sample(value: Any, b: int) -> Any:
    if isinstance(value, Tensor):
        return value[b : b + 1].clone()
    if isinstance(value, tuple):
        parts = [_sample(v, b) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
