"""Swin-V2 over frames, stage by stage: timm's own forward, or its modules over kept units alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsify._torchvision import ensure_torchvision
from sparsify.config import VisionConfig
from sparsify.data.units import from_units
from sparsify.model.masked import MaskedSwinV2, wrap
from sparsify.model.masking import KeptUnits
from sparsify.model.plan import UnitPlan

__all__ = ["VisionEncoder"]

# Every Swin-V2 of timm was trained on frames normalised with these (its default_cfg): ImageNet's mean and deviation.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class VisionEncoder(nn.Module):
    """timm's ``SwinTransformerV2``, without a classifier, in steps: ``embed``, ``stage`` 0, 1, ..., ``finish``.

    Raises ``ConfigError`` for a geometry that cannot be masked exactly, unless it is ``dense`` and never will be.
    """

    scale: Tensor  # fp32 [3, 1, 1]: pixels 0 to 255 are normalised as pixel * scale + shift
    shift: Tensor

    def __init__(self, config: VisionConfig, *, dense: bool = False) -> None:
        super().__init__()
        self.config = config
        self.swin = build_swin(config)
        self.masked = None if dense else wrap(MaskedSwinV2, self.swin, config.unit, "vision")
        mean, std = torch.tensor(_MEAN).view(3, 1, 1), torch.tensor(_STD).view(3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    @property
    def stage_dims(self) -> list[int]:
        """Channels after each stage."""
        return [self.config.embed_dim * 2**i for i in range(len(self.config.depths))]

    def side(self, stage: int) -> int:
        """Tokens along one side of a frame, as ``stage`` returns them."""
        return self.config.image_size // self.config.patch_size // 2**stage

    def embed(self, frames: Tensor) -> Tensor:
        """Pixels, 0 to 255, in units [B, U, 3*p*p], as patch embeddings [B, side, side, C]."""
        image = from_units(frames, self.config.unit, (self.config.units, self.config.units))
        return self.swin.patch_embed(torch.addcmul(self.shift, image.to(self.scale.dtype), self.scale))

    def embed_kept(self, kept: KeptUnits) -> Tensor:
        """Pixels of kept units as patch embeddings [M * u * u, C]."""
        pixels = kept.values.unflatten(1, (3, self.config.unit, self.config.unit)).to(self.scale.dtype)
        assert self.masked is not None  # a dense model draws no units
        return self.masked.embed(torch.addcmul(self.shift, pixels, self.scale), kept.plan)

    def stage(self, index: int, x: Tensor, plan: UnitPlan | None) -> Tensor:
        """Stage ``index``: [B, H, W, C] by timm's own forward, or with a ``plan`` the packed tokens [N, C] of kept
        units.
        """
        if plan is None:
            return self.swin.layers[index](x)
        assert self.masked is not None
        return self.masked.stage(index, x, plan)

    def finish(self, x: Tensor) -> Tensor:
        """The final norm: of [B, side, side, out_dim] or [N, out_dim]."""
        return self.swin.norm(x)


def build_swin(config: VisionConfig) -> Any:
    """A ``SwinTransformerV2`` of this geometry, with random weights as timm draws them: the norms that end each block
    start at zero, so every block starts as the identity.
    """
    ensure_torchvision()
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    return SwinTransformerV2(
        img_size=config.image_size,
        patch_size=config.patch_size,
        window_size=config.window_size,
        embed_dim=config.embed_dim,
        depths=config.depths,
        num_heads=config.heads,
        pretrained_window_sizes=config.pretrained_windows or (0,) * len(config.depths),
        drop_path_rate=0.0,
        num_classes=0,
    )
