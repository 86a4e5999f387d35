"""Adaptive sparse merging: each modality keeps the tokens that the other one attends to, and merges the rest into them.

    audio queries --attend to--> visual keys, values:  what each visual token receives is its score
    visual queries --attend to--> audio keys, values:  likewise
    scores --> key tokens (upper quartile or outliers, sample by sample) --> every token joins its nearest key

The attention that scores also computes: its output, through a gate that starts at zero, is added to the tokens that
asked, so its projections learn from the answer. Both directions look at the tokens as they came in. (Diao et al., ACL
2025, section 3.3.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.config import MergeConfig
from sparsify.model.layers import merge_heads, split_heads
from sparsify.model.outputs import ModalityTokens
from sparsify_kernels import attention_scores, gather_tokens, key_tokens, merge_tokens

__all__ = ["CrossModalMerging"]


class _CrossAttention(nn.Module):
    """One direction: ``x`` asks, ``other`` is scored."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm, self.key_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, other: Tensor, *, score: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """``x`` [V, M, D] after reading ``other`` [V, N, D]; scores of ``other`` fp32 [V, N]; its keys [V, N, D]."""
        y = self.key_norm(other)
        keys = self.key(y)
        q, k = split_heads(self.query(self.query_norm(x)), self.heads), split_heads(keys, self.heads)
        v = split_heads(self.value(y), self.heads)
        received: Tensor | None = None
        output: Tensor | None
        if score:
            received, output = attention_scores(q, k, v)
            assert output is not None  # it is, with v
        else:
            output = F.scaled_dot_product_attention(q, k, v)
        return x + self.gate * self.out(merge_heads(output)), received, keys


class CrossModalMerging(nn.Module):
    """Score, pick and merge, both modalities. Without merging (``enabled=False``) only the attention remains."""

    def __init__(self, dim: int, config: MergeConfig, *, enabled: bool) -> None:
        super().__init__()
        self.config, self.enabled = config, enabled
        self.visual_asks = _CrossAttention(dim, config.heads)
        self.audio_asks = _CrossAttention(dim, config.heads)

    def forward(
        self, visual: Tensor, audio: Tensor, visual_kept: Tensor, audio_kept: Tensor
    ) -> tuple[ModalityTokens, ModalityTokens]:
        """[V, Nv, D] and [V, Na, D] with their dense token indices, merged."""
        asked_visual, audio_scores, audio_keys = self.visual_asks(visual, audio, score=self.enabled)
        asked_audio, visual_scores, visual_keys = self.audio_asks(audio, visual, score=self.enabled)
        return (
            self._merge(asked_visual, visual_keys, visual_scores, visual_kept),
            self._merge(asked_audio, audio_keys, audio_scores, audio_kept),
        )

    def _merge(self, x: Tensor, metric: Tensor, scores: Tensor | None, kept: Tensor) -> ModalityTokens:
        if scores is None:
            size = torch.ones(kept.shape, device=x.device)
            slot = torch.arange(kept.shape[1], device=x.device).expand_as(kept)
            return ModalityTokens(x, size, kept, torch.ones_like(kept, dtype=torch.bool), slot, None, kept)

        share = self.config.capacity
        capacity = None if share is None else max(1, round(share * x.shape[1]))
        keys = key_tokens(scores, fence=self.config.fence, capacity=capacity)
        merged = merge_tokens(x, metric, keys)
        position = gather_tokens(kept.unsqueeze(-1), keys.index).squeeze(-1)
        return ModalityTokens(
            merged.tokens, merged.size.detach().float(), position, keys.valid, merged.assign, scores, kept
        )
