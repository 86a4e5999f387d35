"""Cross-modal adapters between the encoders' stages: each modality reads a few latents of the other one.

    latents [M, d] --attend to--> the other modality's kept tokens, of all frames or segments  (cost M * N)
    own tokens     --attend to--> those latents, --> x + gate * up(...)                         (cost N * M)

The cost is linear in the tokens. Time features enter on both sides, so that a latent can be about a moment and a token
can ask for its own. The gate starts at zero: a new model is its two encoders, undisturbed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.model.layers import merge_heads, split_heads
from sparsify.model.time import TIME_FEATURES

__all__ = ["CrossModalAdapter", "LatentBridge"]

_HEAD_DIM = 32


class LatentBridge(nn.Module):
    """One direction: tokens of width ``dim`` read those of width ``other_dim`` through a few latents of ``width``."""

    def __init__(self, dim: int, other_dim: int, latents: int, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // _HEAD_DIM)
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.read_norm, self.read_down = nn.LayerNorm(other_dim), nn.Linear(other_dim, width)
        self.read_time = nn.Linear(TIME_FEATURES, width, bias=False)
        self.read_key = nn.Linear(width, width, bias=False)
        self.read_value = nn.Linear(width, width)
        self.latent_norm = nn.LayerNorm(width)
        self.write_key = nn.Linear(width, width, bias=False)
        self.write_value = nn.Linear(width, width)
        self.write_norm, self.write_down = nn.LayerNorm(dim), nn.Linear(dim, width)
        self.write_time = nn.Linear(TIME_FEATURES, width, bias=False)
        self.up = nn.Linear(width, dim)
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, time: Tensor, other: Tensor, other_time: Tensor) -> Tensor:
        """``x`` [V, A, n, dim] after reading ``other`` [V, B, m, other_dim].

        ``time`` [V, A, n or 1, TIME_FEATURES] and ``other_time`` likewise.
        """
        seen = self.read_down(self.read_norm(other)) + self.read_time(other_time)
        seen = seen.flatten(1, 2)  # [V, B * m, width]
        k, v = split_heads(self.read_key(seen), self.heads), split_heads(self.read_value(seen), self.heads)
        q = split_heads(self.latents.unsqueeze(0), self.heads).to(k.dtype).expand(len(k), -1, -1, -1)
        latents = self.latents + merge_heads(F.scaled_dot_product_attention(q, k, v))  # [V, M, width]
        latents = self.latent_norm(latents)

        q = (self.write_down(self.write_norm(x)) + self.write_time(time)).flatten(1, 2)  # [V, A * n, width]
        k, v = split_heads(self.write_key(latents), self.heads), split_heads(self.write_value(latents), self.heads)
        read = merge_heads(F.scaled_dot_product_attention(split_heads(q, self.heads), k, v))
        return x + self.gate * self.up(read).view_as(x)


class CrossModalAdapter(nn.Module):
    """Both directions, from the same inputs."""

    def __init__(self, visual_dim: int, audio_dim: int, latents: int, width: int) -> None:
        super().__init__()
        self.visual = LatentBridge(visual_dim, audio_dim, latents, width)
        self.audio = LatentBridge(audio_dim, visual_dim, latents, width)

    def forward(self, visual: Tensor, audio: Tensor, visual_time: Tensor, audio_time: Tensor) -> tuple[Tensor, Tensor]:
        """[V, A, n, Cv] and [V, B, m, Ca], each with its time features, in and out."""
        return (
            self.visual(visual, visual_time, audio, audio_time),
            self.audio(audio, audio_time, visual, visual_time),
        )
