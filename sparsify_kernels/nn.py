"""Drop-in modules over the ops: sparse masking, adaptive sparse merging, and the way back. They need torch only.

>>> import torch
>>> from sparsify_kernels.nn import AdaptiveSparseMerging
>>> merged = AdaptiveSparseMerging()(torch.randn(2, 100, 64))
>>> merged.tokens.shape
torch.Size([2, 25, 64])
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsify_kernels._checks import FLOATS, Arguments
from sparsify_kernels._reference import accumulation_dtype
from sparsify_kernels.attention_scores.op import attention_scores
from sparsify_kernels.key_tokens.op import gather_tokens, key_tokens
from sparsify_kernels.merge_tokens.op import merge_tokens
from sparsify_kernels.random_mask.op import random_mask

__all__ = ["AdaptiveSparseMerging", "SparseMasking", "SparseTokens", "unmerge"]


class SparseTokens(NamedTuple):
    """Fewer tokens, and where they come from: result of ``SparseMasking`` and ``AdaptiveSparseMerging``."""

    tokens: Tensor
    """[B, K, D] in the dtype of the input."""
    size: Tensor
    """fp32 [B, K] (fp64 for fp64): how much each token stands for, 0 in an unused slot."""
    position: Tensor
    """int64 [B, K]: the position of the input token that each one is named after, 0 in an unused slot."""
    valid: Tensor
    """bool [B, K]: which slots are used."""
    assign: Tensor
    """int64 [B, N]: the slot that each input token went into, -1 where it went into none."""
    scores: Tensor | None
    """fp32 [B, N] (fp64 for fp64): the attention each input token received; None where nothing was scored."""


class SparseMasking(nn.Module):
    """Keep a random subset of the tokens; see ``random_mask`` for ``keep``, ``grid`` and ``stratified``.

    The subset is drawn in training and in evaluation alike: whoever wants all tokens does not call the module.
    """

    def __init__(self, keep: float = 0.5, grid: tuple[int, int] | None = None, stratified: bool = False) -> None:
        super().__init__()
        self.keep = keep
        self.grid = grid
        self.stratified = stratified

    def extra_repr(self) -> str:
        return f"keep={self.keep}, grid={self.grid}, stratified={self.stratified}"

    def forward(self, x: Tensor, *, seed: int | Tensor, position: Tensor | None = None) -> SparseTokens:
        """Keep K of the N tokens ``x`` [B, N, D], any dtype.

        Args:
            seed: int, or int64 [] or [B], as in ``random_mask``.
            position: int64 [B, N], passed through for the kept tokens; default ``arange(N)``.

        Returns:
            ``SparseTokens`` with size 1, everything valid, ``assign`` -1 for masked tokens, scores None.

        Raises:
            TypeError, ValueError: as ``random_mask`` does, and for a position of another dtype or shape.
        """
        tokens, index = random_mask(x, self.keep, seed=seed, grid=self.grid, stratified=self.stratified)
        if position is not None:
            args = Arguments("SparseMasking")
            args.tensor("x", x, "B N D")
            args.tensor("position", position, "B N", (torch.int64,))
        slots = torch.arange(index.shape[1], device=x.device).expand(index.shape)
        return SparseTokens(
            tokens=tokens,
            size=x.new_ones(index.shape, dtype=accumulation_dtype(x.dtype)),
            position=index if position is None else gather_tokens(position, index),
            valid=torch.ones_like(index, dtype=torch.bool),
            assign=index.new_full((x.shape[0], x.shape[1]), -1).scatter(1, index, slots),
            scores=None,
        )


class AdaptiveSparseMerging(nn.Module):
    """Score tokens by the attention they receive, pick key tokens by the interquartile range, merge the rest into them.

        scores = received attention of softmax(Q K^T / sqrt(d)),  Q from context, K from x
        keys   = key_tokens(scores, fence, capacity)
        tokens = merge_tokens(x, metric=K, keys)

    Adaptive sparse merging of Diao et al., ACL 2025 (arXiv 2506.01319).

    Args:
        dim: None: no parameters, x and context are keys and queries as they are. Else the width of x, which is
            projected to keys of the same width.
        context_dim: width of the context, projected to queries of width ``dim``; default ``dim``.
        heads: attention heads; must divide the width of the keys.
        fence: see ``key_tokens``; 0 is the upper quartile, 1.5 Tukey's outlier rule.
        capacity: most tokens to keep; default a quarter.
        enabled: False returns the input as it is. May be switched at any time.

    Picking and assigning are discrete: the projections learn through ``scores`` alone, the gradient of ``tokens``
    goes to x and size.
    """

    def __init__(
        self,
        dim: int | None = None,
        context_dim: int | None = None,
        heads: int = 1,
        fence: float = 0.0,
        capacity: int | None = None,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        if heads < 1:
            raise ValueError(f"AdaptiveSparseMerging: heads must be >= 1, got {heads}")
        if dim is None and context_dim is not None:
            raise ValueError(f"AdaptiveSparseMerging: context_dim must be None without dim, got {context_dim}")
        if dim is not None and dim % heads:
            raise ValueError(f"AdaptiveSparseMerging: dim must be a multiple of heads = {heads}, got {dim}")
        self.dim = dim
        self.context_dim = dim if context_dim is None else context_dim
        self.heads = heads
        self.fence = fence
        self.capacity = capacity
        self.enabled = enabled
        self.query = nn.Identity() if dim is None else nn.Linear(dim if context_dim is None else context_dim, dim)
        self.key = nn.Identity() if dim is None else nn.Linear(dim, dim)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, heads={self.heads}, fence={self.fence}, capacity={self.capacity}, enabled={self.enabled}"
        )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        size: Tensor | None = None,
        position: Tensor | None = None,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
    ) -> SparseTokens:
        """Merge ``x`` [B, N, D] into at most K = max(1, N - ceil(0.75 * (N - 1))) tokens, or ``capacity`` if that is
        smaller.

        Args:
            context: [B, M, Dc], what attends to x; None: x itself.
            size: [B, N] float >= 0, how much each token stands for (from an earlier merge); default 1. It weighs the
                attention and the mean.
            position: int64 [B, N], passed through for the key tokens; default ``arange(N)``.
            valid: bool [B, N]. context_valid: bool [B, M], only with a context.

        Returns:
            ``SparseTokens``; with ``enabled=False`` its tokens are the object ``x`` itself, size 1, position and
            assign ``arange(N)`` (size, position and valid those given), scores None.

        Raises:
            TypeError, ValueError: an argument of another dtype, rank, size or device; values as in ``merge_tokens``.
        """
        self._check(x, context, size, position, valid, context_valid)
        batch, tokens = x.shape[:2]
        dtype = accumulation_dtype(x.dtype)
        if not self.enabled:
            natural = torch.arange(tokens, device=x.device).expand(batch, tokens)
            return SparseTokens(
                tokens=x,
                size=x.new_ones((batch, tokens), dtype=dtype) if size is None else size.to(dtype),
                position=natural if position is None else position,
                valid=x.new_ones((batch, tokens), dtype=torch.bool) if valid is None else valid,
                assign=natural,
                scores=None,
            )
        key = self.key(x)
        query = self.query(x if context is None else context)
        scores = attention_scores(
            self._split(query),
            self._split(key),
            key_bias=None if size is None else _log_size(size, valid),
            query_valid=valid if context is None else context_valid,
            key_valid=valid,
        ).received
        keys = key_tokens(scores, fence=self.fence, capacity=self.capacity, valid=valid)
        merged = merge_tokens(x, key, keys, weight=size, valid=valid)
        return SparseTokens(
            tokens=merged.tokens,
            size=merged.size,
            position=keys.index.clamp(min=0) if position is None else gather_tokens(position, keys.index),
            valid=keys.valid,
            assign=merged.assign,
            scores=scores,
        )

    def _split(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, heads, L, D / heads]."""
        return x.unflatten(-1, (self.heads, x.shape[-1] // self.heads)).transpose(1, 2)

    def _check(
        self,
        x: Tensor,
        context: Tensor | None,
        size: Tensor | None,
        position: Tensor | None,
        valid: Tensor | None,
        context_valid: Tensor | None,
    ) -> None:
        args = Arguments("AdaptiveSparseMerging")
        args.tensor("x", x, "B N D" if self.dim is None else f"B N {self.dim}", FLOATS)
        width = x.shape[2]
        args.require(width > 0 and width % self.heads == 0, "x's width", f"a multiple of heads = {self.heads}", width)
        if context is not None:
            args.tensor("context", context, "B M D" if self.dim is None else f"B M {self.context_dim}", FLOATS)
        elif self.context_dim != self.dim:
            args.require(False, "context", f"given: queries are projected from width {self.context_dim}", None)
        if size is not None:
            args.tensor("size", size, "B N", FLOATS)
        if position is not None:
            args.tensor("position", position, "B N", (torch.int64,))
        if valid is not None:
            args.tensor("valid", valid, "B N", (torch.bool,))
        if context_valid is not None:
            args.require(context is not None, "context_valid", "None without a context", context_valid)
            args.tensor("context_valid", context_valid, "B M", (torch.bool,))


def unmerge(tokens: Tensor, assign: Tensor) -> Tensor:
    """Give every input token the token it was merged into: [B, K, D] and ``assign`` int64 [B, N] -> [B, N, D], zeros
    at -1.

    The way back from ``SparseTokens`` to dense positions; the gradient sums over each cluster.

    Raises:
        TypeError, ValueError: an argument of another dtype, rank, size or device, or a slot out of range (as in
        ``gather_tokens``).

    >>> import torch
    >>> unmerge(torch.tensor([[[1.0], [4.0]]]), torch.tensor([[0, 1, 1, -1]]))[0, :, 0]
    tensor([1., 4., 4., 0.])
    """
    args = Arguments("unmerge")
    args.tensor("tokens", tokens, "B K D")
    args.tensor("assign", assign, "B N", (torch.int64,))
    return gather_tokens(tokens, assign)


def _log_size(size: Tensor, valid: Tensor | None) -> Tensor:
    """log(size), -inf where it is 0. The inner select keeps the gradient of an unused slot at 0 instead of 0 / 0."""
    used = size > 0 if valid is None else valid & (size > 0)
    return torch.where(used, torch.where(used, size, 1.0).log(), -torch.inf)
