"""When a token is: Swin and HTS-AT tokens carry no place of their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify.config import AudioConfig

__all__ = ["TIME_FEATURES", "audio_offsets", "time_features"]

_PERIODS = tuple(2.0**k for k in range(8))  # seconds: 1, 2, 4, ..., 128
_TURNS = tuple(2.0**k for k in range(-1, 4))  # half a turn over the clip, one, two, four, eight
TIME_FEATURES = 2 * (len(_PERIODS) + len(_TURNS)) + 1


def time_features(seconds: Tensor, duration: Tensor) -> Tensor:
    """Sines and cosines of the time, absolute and as a share of the clip, and the share itself.

    ``seconds`` fp32 [V, ...], ``duration`` fp32 [V] -> fp32 [V, ..., TIME_FEATURES].
    """
    share = seconds / duration.clamp_min(1e-3).view(-1, *[1] * (seconds.ndim - 1))
    angles = [seconds * (2 * math.pi / period) for period in _PERIODS] + [
        share * (2 * math.pi * turn) for turn in _TURNS
    ]
    angle = torch.stack(angles, dim=-1)
    return torch.cat([angle.sin(), angle.cos(), share.unsqueeze(-1)], dim=-1)


def audio_offsets(config: AudioConfig, side: int, segment_seconds: float, device: torch.device) -> Tensor:
    """Seconds from a segment's start to the middle of each token of a square grid: fp32 [side * side] on ``device``.

    A token at ``row`` lies in run ``row * px // mel_bins`` of the fold (px: pixels of a token's side) and the image's
    columns are time within that run. Tokens taller than a run take the middle of the runs they span.
    """
    px = config.spec_size // side
    runs = config.spec_size // config.mel_bins
    pixels = torch.arange(config.spec_size, device=device)
    run = (pixels // config.mel_bins).view(side, px).float().mean(1)  # [side]
    column = (pixels.view(side, px).float().mean(1) + 0.5) / config.spec_size  # [side], in [0, 1)
    return ((run[:, None] + column) * (segment_seconds / runs)).flatten()
