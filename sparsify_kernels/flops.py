"""Floating-point operations of the ops, for ``torch.utils.flop_counter``: importing this module registers them.

A multiply and an add are two operations; as PyTorch does for its own attention, only products of matrices are counted:
no softmax, no norms, no sums. What is not computed is not counted: ``window_attention`` counts the pairs of tokens
that share a window, from the plan, and a backward the products that it computes again (not what Triton multiplies
besides where tiles are not full, nor, for the gradient of the bias, at places without a token). Masking and picking key
tokens multiply nothing.

>>> import torch
>>> from torch.utils.flop_counter import FlopCounterMode
>>> import sparsify_kernels.flops
>>> from sparsify_kernels import attention_scores
>>> q, k = torch.zeros(1, 2, 10, 16), torch.zeros(1, 2, 20, 16)
>>> with FlopCounterMode(display=False) as counter:
...     _ = attention_scores(q, k, k)
>>> counter.get_total_flops()  # two products of 10 x 20 x 16, a multiply and an add each, in 2 heads
25600
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Importing the ops defines their schemas.
from sparsify_kernels.attention_scores import op as _attention_scores_op  # noqa: F401
from sparsify_kernels.merge_tokens import op as _merge_tokens_op  # noqa: F401
from sparsify_kernels.window_attention import op as _window_attention_op  # noqa: F401

__all__: list[str] = []

_OPS = torch.ops.sparsify_kernels


@register_flop_formula(_OPS.attention_scores, get_raw=True)
def _attention_scores(q: Tensor, k: Tensor, v: Tensor | None, *_: Any, **__: Any) -> int:
    return 2 * _pairs(q, k) * (q.shape[3] + _width(v))  # q k^T and P v


@register_flop_formula(_OPS.attention_scores_backward, get_raw=True)
def _attention_scores_backward(
    grad_received: Tensor | None,
    grad_output: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *rest: Any,
    **_: Any,
) -> int:
    wanted = rest[-1]  # gradients of q, k, v and the key bias
    products = q.shape[3] * (1 + wanted[0] + wanted[1])  # q k^T again, dq, dk
    if grad_output is not None:
        into_logits = wanted[0] or wanted[1] or wanted[3]
        products += _width(v) * (into_logits + wanted[2])  # gO v^T, P^T gO
    return 2 * _pairs(q, k) * products


@register_flop_formula(_OPS.merge_tokens, get_raw=True)
def _merge_tokens(x: Tensor, metric: Tensor, index: Tensor, *_: Any, **__: Any) -> int:
    batch, tokens, dim = metric.shape
    return 2 * batch * tokens * index.shape[1] * dim  # the similarities; the means are sums


@register_flop_formula(_OPS.window_attention, get_raw=True)
def _window_attention(
    qkv: Tensor, bias: Tensor, scale: Tensor | None, member: Tensor, start: Tensor, *_: Any, **__: Any
) -> int:
    return 2 * _pairs_in_windows(start) * qkv.shape[2] * 2 * qkv.shape[3]  # q k^T and P v


@register_flop_formula(_OPS.window_attention_backward, get_raw=True)
def _window_attention_backward(
    grad: Tensor, qkv: Tensor, bias: Tensor, scale: Tensor | None, member: Tensor, start: Tensor, *rest: Any, **_: Any
) -> int:
    wanted = rest[-1]  # gradients of qkv, bias and scale
    products = 2 + 3 * wanted[0]  # q k^T again, gO v^T; dq, dk, dv
    return 2 * _pairs_in_windows(start) * qkv.shape[2] * products * qkv.shape[3]


def _pairs(q: Tensor, k: Tensor) -> int:
    return q.shape[:3].numel() * k.shape[2]


def _width(v: Tensor | None) -> int:
    return 0 if v is None else v.shape[3]


def _pairs_in_windows(start: Tensor) -> int:
    """Reads the plan: counting waits for the device."""
    return int(start.diff().square().sum())
