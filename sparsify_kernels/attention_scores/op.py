"""attention_scores: the public function, its schemas, fakes and gradient."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsify_kernels import _registry
from sparsify_kernels._checks import FLOATS, Arguments, call, describe
from sparsify_kernels._reference import accumulation_dtype
from sparsify_kernels.attention_scores import reference

__all__ = ["AttentionScores", "attention_scores"]


class AttentionScores(NamedTuple):
    """Result of ``attention_scores``."""

    received: Tensor
    """fp32 [B, N] (fp64 for fp64): the attention each key received, averaged over heads and valid queries."""
    output: Tensor | None
    """[B, H, M, dv] in the dtype of q: attention as usual; None without v."""


def attention_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    query_valid: Tensor | None = None,
    key_valid: Tensor | None = None,
) -> AttentionScores:
    """Attention, and how much of it every key received.

        P[h, i, :]   = softmax over the valid keys j of (scale * q[h, i] . k[h, j] + key_bias[j])
        output[h, i] = sum_j P[h, i, j] v[h, j]
        received[j]  = mean over heads h and valid queries i of P[h, i, j]

    ``received`` sums to 1 over the valid keys of a sample. A sample without a valid key has output and received 0,
    one without a valid query has received 0, and the output of an invalid query is 0.

    Args:
        q: [B, H, M, d], fp32, bf16, fp16 or fp64, with any strides; B, M and N may be 0. Under autocast q, k and v
            are cast to its dtype.
        k: [B, H, N, d] in q's dtype.
        v: [B, H, N, dv] in q's dtype, or None for the scores alone.
        scale: factor of the dot products, default ``1 / sqrt(d)``.
        key_bias: [B, N], any float dtype, added to the logits in fp32 (fp64 for fp64): ``log(size)`` lets a merged
            token count as many. A key of bias -inf is seen by no query.
        query_valid: bool [B, M]. key_valid: bool [B, N]. What stands at invalid positions, NaN included, reaches no
            result and no gradient.

    Returns:
        ``AttentionScores(received, output)``, both differentiable (once) in q, k, v and key_bias.

    Raises:
        TypeError: an argument of another type or dtype. ValueError: another rank, size or device, or a scale that is
            not finite.

    Deterministic; a sample's result does not depend on its batch-mates. The cross-modal scores of Diao et al., ACL
    2025 (arXiv 2506.01319).

    >>> import torch
    >>> from sparsify_kernels import attention_scores
    >>> q, k = torch.tensor([[[[1.0], [-1.0]]]]), torch.tensor([[[[0.0], [100.0]]]])
    >>> attention_scores(q, k).received  # the first query sees the second key only, the second query the first only
    tensor([[0.5000, 0.5000]])
    """
    q, k, v = (_autocast(t) for t in (q, k, v))
    args = Arguments("attention_scores")
    args.tensor("q", q, "B H M d", FLOATS)
    if args.sizes["H"] == 0 or args.sizes["d"] == 0:
        raise ValueError(f"attention_scores: q must be [B, H, M, d] with H >= 1 and d >= 1, got {describe(q)}")
    args.tensor("k", k, "B H N d", FLOATS)
    args.same_dtype("k", k, "q", q)
    if v is not None:
        args.tensor("v", v, "B H N dv", FLOATS)
        args.same_dtype("v", v, "q", q)
    if key_bias is not None:
        args.tensor("key_bias", key_bias, "B N", FLOATS)
        key_bias = key_bias.to(accumulation_dtype(q.dtype))
    if query_valid is not None:
        args.tensor("query_valid", query_valid, "B M", (torch.bool,))
    if key_valid is not None:
        args.tensor("key_valid", key_valid, "B N", (torch.bool,))
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"attention_scores: scale must be a float or None, got {describe(scale)}")
        args.require(-math.inf < scale < math.inf, "scale", "finite", scale)
    received, output, _ = call(_OP, q, k, v, key_bias, query_valid, key_valid, scale)
    return AttentionScores(received, None if v is None else output)


def _autocast(x: Any) -> Any:
    """``x`` as autocast wants it: fp32, bf16 and fp16 in the autocast dtype, fp64 and anything else as it is."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    key_bias: Tensor | None,
    query_valid: Tensor | None,
    key_valid: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    dtype = accumulation_dtype(q.dtype)
    return (
        q.new_empty((batch, k.shape[2]), dtype=dtype),
        q.new_empty((batch, heads, queries, 0 if v is None else v.shape[3])),
        q.new_empty((batch, heads, queries), dtype=dtype),
    )


def _fake_backward(
    grad_received: Tensor | None,
    grad_output: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    key_bias: Tensor | None,
    query_valid: Tensor | None,
    key_valid: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape if wanted[0] else (0,)),
        k.new_empty(k.shape if wanted[1] else (0,)),
        v.new_empty(v.shape) if wanted[2] and v is not None else q.new_empty((0,)),
        lse.new_empty((k.shape[0], k.shape[2]) if wanted[3] else (0,)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, key_bias, query_valid, key_valid, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, key_bias, query_valid, key_valid, output[1], output[2])
    ctx.set_materialize_grads(False)  # a gradient that nobody asked for stays None: no zeros to read


def _backward(
    ctx: Any, grad_received: Tensor | None, grad_output: Tensor | None, grad_lse: None
) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:4])
    grads = _BACKWARD(grad_received, grad_output, *ctx.saved_tensors, ctx.scale, wanted)
    return (*(g if w else None for g, w in zip(grads, wanted, strict=True)), None, None, None)


_OP = _registry.define(
    "attention_scores",
    "(Tensor q, Tensor k, Tensor? v, Tensor? key_bias, Tensor? query_valid, Tensor? key_valid, float? scale)"
    " -> (Tensor received, Tensor output, Tensor lse)",
    reference=reference.attention_scores,
    fake=_fake,
)
_BACKWARD = _registry.define(
    "attention_scores_backward",
    "(Tensor? grad_received, Tensor? grad_output, Tensor q, Tensor k, Tensor? v, Tensor? key_bias, Tensor? query_valid,"
    " Tensor? key_valid, Tensor output, Tensor lse, float? scale, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.attention_scores_backward,
    fake=_fake_backward,
)
_registry.differentiate("attention_scores", _backward, _setup)
_registry.refuse_second_derivative("attention_scores_backward")
