"""A question's words attend to a video's super-tokens; an answer comes out.

Questions of one video share its keys and values: their words are packed as [V, width * L] queries, so nothing of the
video is copied to a question.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.batch import Questions
from sparsify.config import FusionConfig
from sparsify.model.layers import Attention, Mlp, key_mask
from sparsify.model.outputs import SuperTokens

__all__ = ["AnswerHead", "FusionLayer", "pack_questions", "unpack_questions"]


def pack_questions(x: Tensor, questions: Questions, videos: int) -> Tensor:
    """Words of questions [Q, L, D] beside each other, video by video: [V, width * L, D], padded with zeros."""
    packed = x.new_zeros(videos, questions.width, *x.shape[1:])
    return packed.index_put((questions.video_index, questions.rank), x).flatten(1, 2)


def unpack_questions(x: Tensor, questions: Questions) -> Tensor:
    """The inverse of ``pack_questions``: [Q, L, D]."""
    return x.unflatten(1, (questions.width, -1))[questions.video_index, questions.rank]


class FusionLayer(nn.Module):
    """Self-attention over the question's words, attention to the super-tokens, MLP: pre-norm, residual."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.word_norm, self.norm, self.mlp_norm = (nn.LayerNorm(config.dim) for _ in range(3))
        self.words = Attention(config.dim, config.heads, config.dropout)
        self.attention = Attention(config.dim, config.heads, config.dropout)
        self.mlp = Mlp(config.dim, config.dropout)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, word_mask: Tensor, questions: Questions, keys: tuple[Tensor, Tensor], mask: Tensor
    ) -> Tensor:
        """Words [Q, L, D]; ``keys`` of the V videos' super-tokens and the ``mask`` over them."""
        y = self.word_norm(x)
        x = x + self.drop(self.words(y, self.words.keys(y), word_mask))
        packed = pack_questions(self.norm(x), questions, len(keys[0]))
        x = x + self.drop(unpack_questions(self.attention(packed, keys, mask), questions))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


class AnswerHead(nn.Module):
    """All fusion layers, pooling and the classifier."""

    def __init__(self, config: FusionConfig, answers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusionLayer(config) for _ in range(config.layers))
        self.token_norm = nn.LayerNorm(config.dim)
        self.norm = nn.LayerNorm(2 * config.dim)
        self.classifier = nn.Sequential(
            nn.Linear(2 * config.dim, config.dim), nn.GELU(), nn.Linear(config.dim, answers)
        )

    def forward(self, words: Tensor, word_valid: Tensor, questions: Questions, tokens: SuperTokens) -> Tensor:
        """Logits fp32 [Q, answers] from words [Q, L, D], of which the first stands for the whole question."""
        y = self.token_norm(tokens.tokens)
        mask, word_mask = key_mask(tokens.valid, tokens.size), key_mask(word_valid)
        for layer in self.layers:
            assert isinstance(layer, FusionLayer)
            words = layer(words, word_mask, questions, layer.attention.keys(y), mask)
        mean = (words * word_valid.unsqueeze(-1)).sum(1) / word_valid.sum(1, keepdim=True)
        return self.classifier(self.norm(torch.cat([words[:, 0], mean], dim=-1))).float()
