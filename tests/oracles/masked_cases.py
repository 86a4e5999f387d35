"""Small encoders of the libraries with the masked ones around them, and what both give for the same mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from masked_oracle import htsat_oracle, kept_tokens, swin_oracle
from torch import Tensor, nn

from sparsify.config import AudioConfig, VisionConfig
from sparsify.data.units import to_units
from sparsify.model.audio import build_htsat
from sparsify.model.masked import MaskedHTSAT, MaskedSwinV2
from sparsify.model.plan import UnitPlan
from sparsify.model.vision import build_swin
from sparsify_kernels import random_mask

SMALL = {"patch_size": 4, "embed_dim": 8, "depths": (2, 2, 2), "heads": (1, 2, 2)}


class Case(NamedTuple):
    """An encoder of the library, the masked one around it, and images [B, C, H, W]."""

    library: nn.Module
    masked: MaskedSwinV2 | MaskedHTSAT
    images: Tensor


def make(name: str, size: int, window: int, unit: int, dtype: torch.dtype = torch.float64, images: int = 3) -> Case:
    torch.manual_seed(size + window)
    if name == "swin":
        library = build_swin(VisionConfig(image_size=size, window_size=window, unit=unit, **SMALL))
    else:
        library = build_htsat(AudioConfig(spec_size=size, mel_bins=size // 2, window_size=window, unit=unit, **SMALL))
    library = randomised(library).to(dtype)
    wrapper = MaskedSwinV2 if name == "swin" else MaskedHTSAT
    return Case(library, wrapper(library, unit), torch.randn(images, 3 if name == "swin" else 1, size, size).to(dtype))


def randomised(library: nn.Module) -> nn.Module:
    """Initial values of norms, biases, tables and temperatures hide mistakes."""
    with torch.no_grad():
        for key, p in library.named_parameters():
            if p.ndim <= 1 or key.endswith("relative_position_bias_table"):
                p.copy_(0.5 * torch.randn_like(p))
            if "cpb_mlp" in key or "qkv.weight" in key or (".self." in key and p.ndim == 2):
                p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5 * 2)  # attention that makes a difference
            if key.endswith("logit_scale"):
                p.copy_(3.5 + 1.5 * torch.randn_like(p))  # some beyond log 100, where the library cuts them off
        if hasattr(library, "batch_norm"):
            library.batch_norm.running_mean.normal_()
            library.batch_norm.running_var.uniform_(0.5, 2)
    return library


def draw(case: Case, keep: float, stratified: bool, seed: int = 1) -> Tensor:
    """bool [B, grid, grid]: another mask for each image."""
    grid = case.masked.grid
    units = torch.arange(grid * grid).expand(len(case.images), -1).unsqueeze(-1)
    index = random_mask(units, keep, seed=seed, grid=(grid, grid) if stratified else None, stratified=stratified).index
    kept = torch.zeros(len(case.images), grid * grid, dtype=torch.bool).scatter(1, index, True)
    return kept.unflatten(1, (grid, grid))


def ours(case: Case, kept: Tensor, images: Tensor | None = None) -> Tensor:
    plan, units = planned(case, kept, case.images if images is None else images)
    return case.masked(units, plan)


def planned(case: Case, kept: Tensor, images: Tensor) -> tuple[UnitPlan, Tensor]:
    unit = images.shape[-1] // case.masked.grid
    image, number = kept.flatten(1).nonzero(as_tuple=True)
    units = to_units(images, unit)[image, number].unflatten(1, (images.shape[1], unit, unit))
    return case.masked.plan(image, number, len(images)), units


def oracle(case: Case, kept: Tensor, images: Tensor | None = None) -> Tensor:
    run = swin_oracle if isinstance(case.masked, MaskedSwinV2) else htsat_oracle
    return kept_tokens(run(case.library, case.images if images is None else images, kept), kept)


def gradients(case: Case, out: Tensor) -> list[Tensor]:
    torch.manual_seed(7)
    return list(torch.autograd.grad((out * torch.randn(out.shape).to(out)).sum(), list(case.library.parameters())))


def as_grid(case: Case) -> Tensor:
    everything = torch.ones(len(case.images), case.masked.grid, case.masked.grid, dtype=torch.bool)
    return (swin_oracle if isinstance(case.masked, MaskedSwinV2) else htsat_oracle)(
        case.library, case.images, everything
    )
