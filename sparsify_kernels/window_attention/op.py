"""window_attention: the public function, its schemas, fakes and gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsify_kernels import _registry
from sparsify_kernels._checks import FLOATS, Arguments, call, describe
from sparsify_kernels._reference import accumulation_dtype
from sparsify_kernels.window_attention import reference

__all__ = ["Windows", "window_attention"]


class Windows(NamedTuple):
    """N packed tokens sorted into W windows: a partition, whose sizes are data and whose number is not.

    Window w holds the tokens ``member[start[w] : start[w + 1]]``, none perhaps; ``place`` and ``region`` tell of
    members, in the order of ``member``.
    """

    member: Tensor
    """int64 [N]: row of each token in the packed tensor, window after window; each row once."""
    start: Tensor
    """int64 [W + 1]: where in ``member`` each window begins, from 0 up to N."""
    place: Tensor
    """int64 [N]: ``row * width + column`` of the token inside its window; no two of a window alike."""
    region: Tensor | None
    """int64 [N]: which part of the picture it comes from, where a cyclic shift brings several into one window."""


def window_attention(
    qkv: Tensor, bias: Tensor, windows: Windows, *, scale: Tensor | None = None, cosine: bool = False
) -> Tensor:
    """Attention of each token to those of its window that are there.

        S[h, i, j]   = scale[h] * q[i, h] . k[j, h] + bias[h, r_i - r_j + wh - 1, c_i - c_j + ww - 1]
                       - 100 where region[i] != region[j]
        output[i, h] = sum_j softmax_j(S[h, i, :])[j] v[j, h]

    over the tokens j of the window of i, which stands at row r_i and column c_i of a window of wh x ww places. Only
    tokens that are there are read and computed (but for the gradient of the bias on a GPU, which goes over all pairs of
    places of each window that holds a token). That is the attention of Swin (``bias`` its table) and of Swin-V2
    (``cosine``, ``bias`` what the log-spaced coordinates give), and of a shifted window too.

    Args:
        qkv: [N, 3, H, d], queries, keys and values of packed tokens, fp32, bf16, fp16 or fp64, with any strides; N may
            be 0.
        bias: [H, 2 * wh - 1, 2 * ww - 1], any float dtype: what is added for each difference of places, in fp32 (fp64
            for fp64).
        windows: which tokens share a window, where they stand in it, and which region they are from.
        scale: [H], any float dtype: factor of the dot products; default ``1 / sqrt(d)``, with ``cosine`` 1.
        cosine: compare directions: q and k are divided by their lengths, which count as at least 1e-12.

    Returns:
        [N, H, d] in the dtype of qkv; differentiable (once) in qkv, bias and scale.

    Raises:
        TypeError: an argument of another type or dtype. ValueError: another rank, size or device, or windows that are
            no partition of the tokens or have two at one place (inside ``torch.compile`` a ``RuntimeError``; on a GPU
            this is looked for only with ``SPARSIFY_CHECK=1``: otherwise all of the output is NaN).

    Deterministic; a window's output depends on that window alone. Liu et al., Swin Transformer (arXiv 2103.14030) and
    Swin Transformer V2 (arXiv 2111.09883), for windows of which a part is masked.

    >>> import torch
    >>> from sparsify_kernels import Windows, window_attention
    >>> qkv = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 2.0], [0.0, 0.0, 9.0]]).view(3, 3, 1, 1)
    >>> windows = Windows(torch.tensor([0, 2, 1]), torch.tensor([0, 2, 3]), torch.tensor([0, 3, 1]), None)
    >>> window_attention(qkv, torch.zeros(1, 3, 3), windows).flatten()  # tokens 0 and 2 share a window of 2 x 2
    tensor([5., 2., 5.])
    """
    args = Arguments("window_attention")
    args.tensor("qkv", qkv, "N 3 H d", FLOATS)
    if args.sizes["H"] == 0 or args.sizes["d"] == 0:
        raise ValueError(f"window_attention: qkv must be [N, 3, H, d] with H >= 1 and d >= 1, got {describe(qkv)}")
    args.tensor("bias", bias, "H R C", FLOATS)
    odd = args.sizes["R"] % 2 == 1 and args.sizes["C"] % 2 == 1
    args.require(odd, "bias", "[H, 2 * wh - 1, 2 * ww - 1]", bias)
    if not isinstance(windows, Windows):
        raise TypeError(f"window_attention: windows must be Windows(member, start, ...), got {describe(windows)}")
    args.tensor("windows.member", windows.member, "N", (torch.int64,))
    args.tensor("windows.start", windows.start, "W+1", (torch.int64,))
    args.require(windows.start.shape[0] >= 2, "windows.start", "int64 [W + 1] with W >= 1", windows.start)
    args.tensor("windows.place", windows.place, "N", (torch.int64,))
    if windows.region is not None:
        args.tensor("windows.region", windows.region, "N", (torch.int64,))
    dtype = accumulation_dtype(qkv.dtype)
    if scale is not None:
        args.tensor("scale", scale, "H", FLOATS)
        scale = scale.to(dtype)
    if not isinstance(cosine, bool):
        raise TypeError(f"window_attention: cosine must be a bool, got {describe(cosine)}")
    return call(_OP, qkv, bias.to(dtype), scale, *windows, cosine)[0]


def _fake(
    qkv: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    member: Tensor,
    start: Tensor,
    place: Tensor,
    region: Tensor | None,
    cosine: bool,
) -> tuple[Tensor, Tensor]:
    tokens, _, heads, dim = qkv.shape
    return qkv.new_empty((tokens, heads, dim)), bias.new_empty((tokens, heads))


def _fake_backward(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    member: Tensor,
    start: Tensor,
    place: Tensor,
    region: Tensor | None,
    lse: Tensor,
    cosine: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        qkv.new_empty(qkv.shape if wanted[0] else (0,)),
        bias.new_empty(bias.shape if wanted[1] else (0,)),
        bias.new_empty((bias.shape[0],) if wanted[2] else (0,)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.cosine = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)  # no zeros to read for lse, which nobody differentiates


def _backward(ctx: Any, grad: Tensor | None, grad_lse: None) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    if grad is None:
        return (None,) * 8
    grads = _BACKWARD(grad, *ctx.saved_tensors, ctx.cosine, wanted)
    return (*(g if w else None for g, w in zip(grads, wanted, strict=True)), None, None, None, None, None)


_OP = _registry.define(
    "window_attention",
    "(Tensor qkv, Tensor bias, Tensor? scale, Tensor member, Tensor start, Tensor place, Tensor? region, bool cosine)"
    " -> (Tensor output, Tensor lse)",
    reference=reference.window_attention,
    fake=_fake,
)
_BACKWARD = _registry.define(
    "window_attention_backward",
    "(Tensor grad, Tensor qkv, Tensor bias, Tensor? scale, Tensor member, Tensor start, Tensor place, Tensor? region,"
    " Tensor lse, bool cosine, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    reference=reference.window_attention_backward,
    fake=_fake_backward,
)
_registry.differentiate("window_attention", _backward, _setup)
_registry.refuse_second_derivative("window_attention_backward")
