"""The transformer pieces that text, mixer and fusion share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention", "Mlp", "TransformerLayer", "key_mask", "merge_heads", "select_rows", "split_heads"]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, D] as [B, heads, N, D / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, N, d] as [B, N, heads * d]."""
    return x.transpose(1, 2).flatten(2)


def select_rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]`` for ``x`` [R, ...] and ``index`` int64 [...], with a gradient that is the same on every run.

    Indexing adds the gradients of a row up in the order in which the threads of a CPU come by.
    """
    return F.embedding(index, x.flatten(1)).view(*index.shape, *x.shape[1:])


def key_mask(valid: Tensor, size: Tensor | None = None) -> Tensor:
    """What is added to the logits of each key: log(size), -inf where invalid. [B, N] -> fp32 [B, 1, 1, N].

    A token that stands for ``size`` others weighs as much as they did.
    """
    bias = torch.zeros_like(valid, dtype=torch.float32) if size is None else size.clamp_min(1e-6).log()
    return bias.masked_fill(~valid, -torch.inf)[:, None, None, :]


class Attention(nn.Module):
    """Multi-head attention. Keys have no bias: a softmax over keys cannot see one, so it would never learn."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def keys(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of [B, N, D]: two of [B, heads, N, d]."""
        return split_heads(self.key(y), self.heads), split_heads(self.value(y), self.heads)

    def forward(self, x: Tensor, keys: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Queries from ``x`` [B, M, D] attend to ``keys``; ``mask`` (or None) is added to the logits."""
        q, (k, v) = split_heads(self.query(x), self.heads), keys
        mask = None if mask is None else mask.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=self.dropout if self.training else 0.0)
        return self.out(merge_heads(out))


class Mlp(nn.Sequential):
    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))


class TransformerLayer(nn.Module):
    """Self-attention and MLP, each after a norm and around a residual."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, dropout)
        self.mlp = Mlp(dim, dropout)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, N, D] -> [B, N, D]; ``mask`` as in ``Attention``."""
        y = self.attention_norm(x)
        x = x + self.drop(self.attention(y, self.attention.keys(y), mask))
        return x + self.drop(self.mlp(self.mlp_norm(x)))
