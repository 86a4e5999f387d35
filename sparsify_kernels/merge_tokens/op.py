"""merge_tokens: the public function, its schemas, fakes and gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsify_kernels import _registry
from sparsify_kernels._checks import FLOATS, Arguments, call, describe
from sparsify_kernels._reference import accumulation_dtype
from sparsify_kernels.key_tokens.op import KeyTokens
from sparsify_kernels.merge_tokens import reference

__all__ = ["MergedTokens", "merge_tokens"]


class MergedTokens(NamedTuple):
    """Result of ``merge_tokens``."""

    tokens: Tensor
    """[B, K, D] in the dtype of x: the weighted mean of each cluster."""
    size: Tensor
    """fp32 [B, K] (fp64 for fp64): the total weight of each cluster."""
    assign: Tensor
    """int64 [B, N]: the slot that each token joined, -1 where it is invalid."""


def merge_tokens(
    x: Tensor,
    metric: Tensor,
    keys: KeyTokens,
    *,
    weight: Tensor | None = None,
    valid: Tensor | None = None,
) -> MergedTokens:
    """Merge every valid token into the key token most similar to it; nothing is lost.

        assign[i] = argmax_j metric[i] . metric[key[j]]      a key joins itself; ties to the lower slot
        size[j]   = sum_{assign[i] = j} weight[i]
        tokens[j] = sum_{assign[i] = j} weight[i] x[i] / size[j]

    so that ``sum_j size[j] tokens[j] = sum_i weight[i] x[i]``, and merging the result again with ``weight=size``
    gives the mean of the originals. tokens and size are 0, and so are the gradients, beyond ``keys.count`` and for a
    cluster of weight 0.

    Args:
        x: [B, N, D], fp32, bf16, fp16 or fp64, with any strides; B and N may be 0.
        metric: [B, N, d], any float dtype: what similarity is measured on; compared in fp32, NaN counts as -inf.
        keys: the key tokens; they must be valid tokens, at least one where a sample has valid tokens.
        weight: [B, N], any float dtype, finite and >= 0 at valid tokens; default 1. A merged token's weight is its
            size.
        valid: bool [B, N]. What stands at invalid tokens, NaN included, reaches no result and no gradient.

    Returns:
        ``MergedTokens(tokens, size, assign)``; tokens and size are differentiable (once) in x and weight.

    Raises:
        TypeError: an argument of another type or dtype. ValueError: another rank, size or device, a bad key or a bad
            weight (inside ``torch.compile`` a ``RuntimeError``; on a GPU they are looked for only with
            ``SPARSIFY_CHECK=1``: otherwise tokens and size of that sample alone are NaN with gradient 0, and after a
            bad key its assign is -1).

    Deterministic, sums in fp32 (fp64 for fp64); a sample's result does not depend on its batch-mates. After Diao et
    al., ACL 2025 (arXiv 2506.01319), who merge by ``Sim(i, j) = k_i . k_j``.

    >>> import torch
    >>> from sparsify_kernels import KeyTokens, merge_tokens
    >>> x = torch.tensor([[[1.0], [2.0], [6.0]]])
    >>> keys = KeyTokens(index=torch.tensor([[0, 2]]), count=torch.tensor([2]))
    >>> merge_tokens(x, x, keys).tokens[0, :, 0]  # 2 . 6 > 2 . 1: the middle token joins the last
    tensor([1., 4.])
    """
    args = Arguments("merge_tokens")
    args.tensor("x", x, "B N D", FLOATS)
    args.tensor("metric", metric, "B N d", FLOATS)
    if not isinstance(keys, KeyTokens):
        raise TypeError(f"merge_tokens: keys must be KeyTokens(index, count), got {describe(keys)}")
    args.tensor("keys.index", keys.index, "B K", (torch.int64,))
    if args.sizes["K"] == 0:
        raise ValueError(f"merge_tokens: keys.index must be int64 [B, K] with K >= 1, got {describe(keys.index)}")
    args.tensor("keys.count", keys.count, "B", (torch.int64,))
    if weight is not None:
        args.tensor("weight", weight, "B N", FLOATS)
        weight = weight.to(accumulation_dtype(x.dtype))
    if valid is not None:
        args.tensor("valid", valid, "B N", (torch.bool,))
    return MergedTokens(*call(_OP, x, metric, keys.index, keys.count, weight, valid))


def _fake(
    x: Tensor, metric: Tensor, index: Tensor, count: Tensor, weight: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, dim = x.shape
    slots = index.shape[1]
    return (
        x.new_empty((batch, slots, dim)),
        x.new_empty((batch, slots), dtype=accumulation_dtype(x.dtype)),
        index.new_empty((batch, tokens)),
    )


def _fake_backward(
    grad_tokens: Tensor | None,
    grad_size: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    tokens: Tensor,
    size: Tensor,
    assign: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    return (
        tokens.new_empty((*assign.shape, tokens.shape[2]) if wanted[0] else (0,)),
        size.new_empty(assign.shape if wanted[1] else (0,)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight = inputs[0], inputs[4]
    ctx.save_for_backward(x if ctx.needs_input_grad[4] else None, weight, *output)
    ctx.set_materialize_grads(False)  # a gradient that nobody asked for stays None: no zeros to read


def _backward(
    ctx: Any, grad_tokens: Tensor | None, grad_size: Tensor | None, grad_assign: None
) -> tuple[Tensor | None, ...]:
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[4]]
    dx, dweight = _BACKWARD(grad_tokens, grad_size, *ctx.saved_tensors, wanted)
    return dx if wanted[0] else None, None, None, None, dweight if wanted[1] else None, None


_OP = _registry.define(
    "merge_tokens",
    "(Tensor x, Tensor metric, Tensor index, Tensor count, Tensor? weight, Tensor? valid)"
    " -> (Tensor tokens, Tensor size, Tensor assign)",
    reference=reference.merge_tokens,
    fake=_fake,
)
_BACKWARD = _registry.define(
    "merge_tokens_backward",
    "(Tensor? grad_tokens, Tensor? grad_size, Tensor? x, Tensor? weight, Tensor tokens, Tensor size, Tensor assign,"
    " bool[] wanted) -> (Tensor, Tensor)",
    reference=reference.merge_tokens_backward,
    fake=_fake_backward,
)
_registry.differentiate("merge_tokens", _backward, _setup)
_registry.refuse_second_derivative("merge_tokens_backward")
