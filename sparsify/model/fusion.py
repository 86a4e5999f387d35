"""A question's words attend to a video's super-tokens; an answer comes out.

Questions of one video share its keys and values: their words are packed as [V, width * L] queries, so the attention
copies nothing of the video to a question.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.batch import Questions
from sparsify.config import FusionConfig
from sparsify.model.concepts import ConceptReading, strongest_and_mean
from sparsify.model.layers import Attention, Mlp, key_mask, select_rows
from sparsify.model.outputs import SuperTokens

__all__ = ["AnswerHead", "FusionLayer", "pack_questions", "unpack_questions"]


def pack_questions(x: Tensor, questions: Questions, videos: int) -> Tensor:
    """Words of questions [Q, L, D] beside each other, video by video: [V, width * L, D], padded with zeros."""
    packed = x.new_zeros(videos, questions.width, *x.shape[1:])
    return packed.index_put((questions.video_index, questions.rank), x).flatten(1, 2)


def unpack_questions(x: Tensor, questions: Questions) -> Tensor:
    """The inverse of ``pack_questions``: [Q, L, D]."""
    return select_rows(
        x.unflatten(1, (questions.width, -1)).flatten(0, 1), questions.video_index * questions.width + questions.rank
    )


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
        self, x: Tensor, word_mask: Tensor, questions: Questions, keys: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        """Words [Q, L, D]; ``keys`` of the V videos' super-tokens and the ``mask`` over them."""
        y = self.word_norm(x)
        x = x + self.drop(self.words(y, self.words.keys(y), word_mask))
        packed = pack_questions(self.norm(x), questions, len(keys[0]))
        x = x + self.drop(unpack_questions(self.attention(packed, keys, mask), questions))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


class TokenEvidence(nn.Module):
    """What single super-tokens say about the answer, given the question: the strongest evidence, and all of it.

        e[k] = gelu(A token[k] * (1 + tanh(s(question))) + b(question))
        evidence = W [max_k e[k], sum_k size[k] e[k] / sum_k size[k]]

    Attention averages: early in training, when it is still flat, a small instrument is a few tokens in many and hardly
    moves the average, so nothing learns to see it. The maximum lets one token speak at once; the mean, which sizes
    weight, keeps what is needed for counting.
    """

    def __init__(self, dim: int, question_dim: int, answers: int) -> None:
        super().__init__()
        self.token, self.question = nn.Linear(dim, dim), nn.Linear(question_dim, 2 * dim)
        self.out = nn.Linear(2 * dim, answers)

    def forward(self, tokens: Tensor, question: Tensor, video_index: Tensor, size: Tensor, valid: Tensor) -> Tensor:
        """Logits [Q, answers] of ``question`` [Q, E] about the videos ``video_index`` int64 [Q], whose super-tokens are
        ``tokens`` [V, K, D] with ``size`` and ``valid`` [V, K].
        """
        scale, shift = self.question(question).unsqueeze(1).chunk(2, dim=-1)  # [Q, 1, D]
        token = select_rows(self.token(tokens), video_index)  # [Q, K, D]
        evidence = F.gelu(torch.addcmul(shift, token, 1 + scale.tanh()))
        return self.out(torch.cat(strongest_and_mean(evidence, size[video_index], valid[video_index]), dim=-1))


class AnswerHead(nn.Module):
    """Words read the video's concepts and its tokens, in turn; then pooling, the classifier, and the evidence of
    single tokens."""

    def __init__(self, config: FusionConfig, answers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusionLayer(config) for _ in range(config.layers))
        self.readings = nn.ModuleList(ConceptReading(config.dim) for _ in range(config.layers + 1))
        self.token_norm = nn.LayerNorm(config.dim)
        self.norm = nn.LayerNorm(2 * config.dim)
        self.classifier = nn.Sequential(
            nn.Linear(2 * config.dim, config.dim), nn.GELU(), nn.Linear(config.dim, answers)
        )
        self.evidence = TokenEvidence(config.dim, 2 * config.dim, answers)

    def forward(
        self, words: Tensor, word_valid: Tensor, questions: Questions, tokens: SuperTokens, concepts: Tensor
    ) -> Tensor:
        """Logits fp32 [Q, answers] from words [Q, L, D], of which the first stands for the whole question, about
        videos with ``concepts`` [V, 4 * D]."""
        y = self.token_norm(tokens.tokens)
        mask, word_mask = key_mask(tokens.valid, tokens.size) if tokens.merged else None, key_mask(word_valid)
        asked = select_rows(concepts, questions.video_index)
        *before, last = self.readings
        for reading, layer in zip(before, self.layers, strict=True):
            assert isinstance(layer, FusionLayer)
            words = layer(reading(words, asked), word_mask, questions, layer.attention.keys(y), mask)
        words = last(words, asked)
        mean = (words * word_valid.unsqueeze(-1)).sum(1) / word_valid.sum(1, keepdim=True)
        question = self.norm(torch.cat([words[:, 0], mean], dim=-1))
        evidence = self.evidence(y, question, questions.video_index, tokens.size, tokens.valid)
        return (self.classifier(question) + evidence).float()
