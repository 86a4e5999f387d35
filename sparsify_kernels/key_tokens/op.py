"""key_tokens and gather_tokens: the public functions, their schemas, fakes and gradients."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsify_kernels import _registry
from sparsify_kernels._checks import FLOATS, Arguments, call, describe
from sparsify_kernels.key_tokens import reference

__all__ = ["KeyTokens", "gather_tokens", "key_tokens"]


class KeyTokens(NamedTuple):
    """Result of ``key_tokens``."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody misses
    """int64 [B, K]: the key tokens, ascending; -1 beyond ``count``."""
    count: Tensor  # type: ignore[assignment]
    """int64 [B]: how many key tokens each sample has."""

    @property
    def valid(self) -> Tensor:
        """bool [B, K]: which slots hold a key token."""
        return torch.arange(self.index.shape[1], device=self.index.device) < self.count.unsqueeze(1)


def key_tokens(
    scores: Tensor, *, fence: float = 0.0, capacity: int | None = None, valid: Tensor | None = None
) -> KeyTokens:
    """Pick the key tokens of each sample: those whose score stands out from the sample's interquartile range.

        threshold = Q3 + fence * (Q3 - Q1)          a token is a key where score >= threshold

    Q1 and Q3 are the quartiles of the sample's valid scores as ``torch.quantile`` (linear) defines them. Scores go to
    fp32; quartiles and threshold are computed in fp64. ``fence=0`` is the upper quartile (100 tokens become 25),
    ``fence=1.5`` Tukey's outlier rule. The best valid token is always a key. With more candidates than slots the
    highest scores stay, then the lower index.

    Args:
        scores: [B, N], fp32, bf16, fp16 or fp64, with any strides; B and N may be 0. Not NaN at valid tokens.
        fence: finite and >= 0.
        capacity: the number of slots is K = max(1, N - ceil(0.75 * (N - 1))), the size of an upper quartile, or
            ``capacity`` >= 1 if that is smaller.
        valid: bool [B, N]. What stands at invalid tokens, NaN included, does not count.

    Returns:
        ``KeyTokens(index int64 [B, K] ascending, -1 beyond count; count int64 [B])``. A sample without a valid token
        has count 0. Not differentiable.

    Raises:
        TypeError: an argument of another type or dtype. ValueError: another rank, size or device, a fence or capacity
            out of range, or a NaN score (inside ``torch.compile`` a ``RuntimeError``; on a GPU it is looked for only
            with ``SPARSIFY_CHECK=1`` and counts as -inf otherwise).

    Deterministic, the same index on every backend; a sample's result does not depend on its batch-mates. After Diao
    et al., ACL 2025 (arXiv 2506.01319).

    >>> import torch
    >>> from sparsify_kernels import key_tokens
    >>> key_tokens(torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.3]]))
    KeyTokens(index=tensor([[1, 3]]), count=tensor([2]))
    """
    args = Arguments("key_tokens")
    args.tensor("scores", scores, "B N", FLOATS)
    if isinstance(fence, bool) or not isinstance(fence, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"key_tokens: fence must be a float, got {describe(fence)}")
    args.require(0 <= fence < math.inf, "fence", "finite and >= 0", fence)
    if capacity is not None:
        if isinstance(capacity, bool) or not isinstance(capacity, (int, torch.SymInt)):
            raise TypeError(f"key_tokens: capacity must be an int or None, got {describe(capacity)}")
        args.require(capacity >= 1, "capacity", ">= 1", capacity)
    if valid is not None:
        args.tensor("valid", valid, "B N", (torch.bool,))
    return KeyTokens(*call(_OP, scores, valid, fence, capacity))


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Gather tokens by index, with zeros where the index is -1.

        result[b, j] = x[b, index[b, j]],  0 where index[b, j] = -1

    Args:
        x: [B, N, ...], any dtype, any strides.
        index: int64 [B, K] in [-1, N), in any order, repeats allowed.

    Returns:
        [B, K, ...] in x's dtype. The gradient of x is the sum over the slots of each token.

    Raises:
        TypeError: an argument of another type or dtype. ValueError: another rank, size or device, or an index out of
            range (inside ``torch.compile`` a ``RuntimeError``; on a GPU it is looked for only with
            ``SPARSIFY_CHECK=1``, and gives NaN, or 0 for integers, otherwise).

    Deterministic.

    >>> import torch
    >>> from sparsify_kernels import gather_tokens
    >>> gather_tokens(torch.tensor([[10, 11, 12]]), torch.tensor([[2, 0, -1]]))
    tensor([[12, 10,  0]])
    """
    args = Arguments("gather_tokens")
    inner = [f"D{axis}" for axis in range(1, x.dim() - 1)] if isinstance(x, Tensor) else []
    args.tensor("x", x, " ".join(["B", "N", *inner]))
    args.tensor("index", index, "B K", (torch.int64,))
    return call(_GATHER, x, index, name="gather_tokens")


def _fake(scores: Tensor, valid: Tensor | None, fence: float, capacity: int | None) -> tuple[Tensor, Tensor]:
    batch, tokens = scores.shape
    slots = reference.capacity_of(tokens, capacity)
    return scores.new_empty((batch, slots), dtype=torch.int64), scores.new_empty((batch,), dtype=torch.int64)


def _fake_gather(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((*index.shape, *x.shape[2:]))


def _fake_gather_backward(grad: Tensor, index: Tensor, tokens: int) -> Tensor:
    return grad.new_empty((grad.shape[0], tokens, *grad.shape[2:]))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, index = inputs
    ctx.save_for_backward(index)
    ctx.tokens = x.shape[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
    return _GATHER_BACKWARD(grad, ctx.saved_tensors[0], ctx.tokens) if ctx.needs_input_grad[0] else None, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
    """The backward is linear in its gradient: its own gradient gathers what it summed."""
    return _GATHER(grad, ctx.saved_tensors[0]) if ctx.needs_input_grad[0] else None, None, None


_OP = _registry.define(
    "key_tokens",
    "(Tensor scores, Tensor? valid, float fence, SymInt? capacity) -> (Tensor index, Tensor count)",
    reference=reference.key_tokens,
    fake=_fake,
)
_GATHER = _registry.define(
    "key_tokens_gather",
    "(Tensor x, Tensor index) -> Tensor",
    reference=reference.key_tokens_gather,
    fake=_fake_gather,
)
_GATHER_BACKWARD = _registry.define(
    "key_tokens_gather_backward",
    "(Tensor grad, Tensor index, SymInt tokens) -> Tensor",
    reference=reference.key_tokens_gather_backward,
    fake=_fake_gather_backward,
)
_registry.differentiate("key_tokens_gather", _backward, _setup)
_registry.differentiate("key_tokens_gather_backward", _double_backward, _setup_backward)
