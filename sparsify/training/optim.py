"""What decides a step beside the loss: parameter groups, learning rates, precision, the order of sums."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from sparsify.config import TrainConfig
from sparsify.training.muon import MuonAdamW

if TYPE_CHECKING:
    from sparsify.model import SparsifyModel

__all__ = [
    "Precision",
    "build_optimizer",
    "choose_precision",
    "lr_factor",
    "ordered_sums",
    "parameter_groups",
    "set_learning_rates",
]

# Only the matrices of linear maps decay. Biases, norms, gates, embeddings, position tables and learnt queries are not
# of these types, or are vectors.
_LINEAR_MAPS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


def parameter_groups(model: SparsifyModel | nn.Module, config: TrainConfig) -> list[dict]:
    """The optimiser's groups: encoders and the rest by learning rate, matrices and the others by weight decay.

    Every parameter that takes gradients is in exactly one group; ``peak_lr`` is what the schedule multiplies. With
    ``config.muon`` the matrices (not convolutions) are groups of their own, first, at that multiple of the rate. Empty
    groups are left out.
    """
    matrices = {
        id(p)
        for module in model.modules()
        if isinstance(module, _LINEAR_MAPS)
        for p in module.parameters(recurse=False)
        if p.ndim >= 2
    }
    encoder = {id(p) for p in model.encoder_parameters()}  # type: ignore[operator]
    groups = []
    for in_encoder, rate in ((True, config.encoder_lr), (False, config.lr)):
        for muon, decays in ((True, True), (False, True), (False, False)):
            params = [
                p
                for p in model.parameters()
                if p.requires_grad
                and (id(p) in encoder) == in_encoder
                and (id(p) in matrices) == decays
                and (config.muon > 0 and decays and p.ndim == 2) == muon
            ]
            if params:
                lr = rate * config.muon if muon else rate
                decay = config.weight_decay if decays else 0.0
                group = {"lr": lr, "peak_lr": lr, "weight_decay": decay, "encoder": in_encoder, "muon": muon}
                groups.append({"params": params} | group)
    return groups


def build_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over ``parameter_groups``, with ``config.muon`` Muon for the matrices; AdamW is one fused kernel per dtype
    on CPU and CUDA."""
    kind = MuonAdamW if config.muon else torch.optim.AdamW
    return kind(parameter_groups(model, config), betas=(0.9, 0.98), fused=device.type in ("cpu", "cuda"))


def lr_factor(progress: float, warmup: float) -> float:
    """Share of the peak learning rate at ``progress`` in [0, 1]: linear up to ``warmup``, then a half cosine to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / (1.0 - warmup)))


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate becomes its peak times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


class Precision(NamedTuple):
    """The number format of the forward pass, ``fp32`` or ``bf16``, and why."""

    name: str
    reason: str


def choose_precision(asked: str, device: torch.device) -> Precision:
    """``asked`` is ``auto``, ``fp32`` or ``bf16``; ``auto`` takes bf16 only where the hardware multiplies it.

    A CPU without AVX-512 BF16 or AMX emulates bf16 matrix products, up to two orders of magnitude slower than fp32.
    """
    if asked != "auto":
        return Precision(asked, "as configured")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", f"{torch.cuda.get_device_name(device)} multiplies bf16")
        return Precision("fp32", f"{torch.cuda.get_device_name(device)} does not multiply bf16")
    if device.type == "cpu":
        features = _cpu_bf16_features()
        if features:
            return Precision("bf16", f"this CPU has {' and '.join(features)}")
        return Precision("fp32", "this CPU has neither AVX-512 BF16 nor AMX")
    return Precision("fp32", f"bf16 on {device.type} is not used unless asked for")


def _cpu_bf16_features() -> list[str]:
    """Which of the instructions that multiply bf16 this CPU has."""
    found = torch.cpu.get_capabilities()
    names = {"avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX BF16"}
    return [text for key, text in names.items() if found.get(key)]


@contextlib.contextmanager
def ordered_sums(device: torch.device) -> Iterator[None]:
    """On a CPU, PyTorch's deterministic algorithms: threads otherwise add the gradients of an index (the libraries'
    tables of relative positions) up as they come by, and runs differ in their last bits. Elsewhere nothing changes.
    What PyTorch cannot order it warns of, once.
    """
    if device.type != "cpu":
        yield
        return
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=warns or not enabled)
    memory.fill_uninitialized_memory = filled and enabled  # costs time, changes no result
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        memory.fill_uninitialized_memory = filled
