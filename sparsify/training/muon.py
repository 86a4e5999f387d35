"""Muon for the matrices, AdamW for the rest.

Muon (Jordan et al. 2024) moves a matrix by its momentum made orthogonal: every direction that the gradients agree on
counts alike, where AdamW follows the few strong ones. Small models trained from scratch learn from fewer samples.
An orthogonal n x m matrix has root mean square sqrt(1 / max(n, m)): scaled to 0.2, it moves as AdamW does (Liu et al.
2025, arXiv 2502.16982).

``torch.optim.Muon`` does the same in bf16, a matrix at a time; on a CPU without bf16 that takes longer than the model.
Here all matrices of one shape go through it together, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

__all__ = ["MuonAdamW", "orthogonalised"]

_STEPS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic: singular values end between 0.68 and 1.14
_MOMENTUM = 0.95
_RMS = 0.2


def orthogonalised(x: Tensor) -> Tensor:
    """The nearly orthogonal matrices to ``x`` fp32 [B, n, m], n <= m: Newton-Schulz, singular values about 1.

    A step is ``x = p x`` with ``p = a + b g + c g^2`` and ``g = x x^T``, so the next one has ``g = p g p``: the steps
    stay with n x n matrices, and ``x`` is multiplied once, by the product of all ``p``.
    """
    a, b, c = _COEFFICIENTS
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    gram, product = x @ x.mT, None
    for step in range(_STEPS):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        product = p if product is None else p @ product
        if step + 1 < _STEPS:
            gram = p @ gram @ p
    assert product is not None
    return product @ x


class MuonAdamW(torch.optim.Optimizer):
    """Groups with ``muon=True`` hold matrices and follow Muon, the others AdamW; both decay their weights decoupled.

    Args:
        params: groups as any optimiser's, each with ``muon``.
        lr, weight_decay: of groups without their own.
        betas, eps: AdamW's.
        fused: AdamW as one kernel.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        fused: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "muon": False}
        super().__init__(params, defaults)
        self.fused = fused
        for group in self.param_groups:
            if group["muon"] and any(p.ndim != 2 for p in group["params"]):
                raise ValueError("MuonAdamW: a group with muon=True holds matrices only")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._muon if group["muon"] else self._adamw)(group, params)
        return loss

    def _muon(self, group: dict[str, Any], params: list[Tensor]) -> None:
        shapes: dict[tuple[int, ...], list[Tensor]] = {}
        for p in params:
            shapes.setdefault(tuple(sorted(p.shape)), []).append(p)
        for (_, longer), same in shapes.items():
            updates = torch.stack([_lying(self._nesterov(p)) for p in same])
            for p, update in zip(same, orthogonalised(updates.float()), strict=True):
                update = update if p.shape[0] <= p.shape[1] else update.mT
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.to(p.dtype), alpha=-group["lr"] * _RMS * longer**0.5)

    def _nesterov(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        assert p.grad is not None
        momentum = state["momentum"].lerp_(p.grad, 1 - _MOMENTUM)
        return p.grad.lerp(momentum, _MOMENTUM)

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                device = p.device if self.fused else None
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=device)
                self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=self.fused,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _lying(x: Tensor) -> Tensor:
    return x if x.shape[0] <= x.shape[1] else x.mT
