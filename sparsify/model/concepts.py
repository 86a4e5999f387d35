"""What a video shows and plays, as one vector that every word of a question can read, and that questions can be
matched with.

Attention normalises: the word "cello" attends to *something* even where no cello is, and what it reads tells little
of how strongly it was there. Concepts are not normalised:

    e[k]     = gelu(W token[k])                                       for each modality its own W
    concepts = norm [max_k e[k], sum_k size[k] e[k] / sum_k size[k]]  over visual tokens, then over audio tokens
    word    += U (S word * concepts)

A word picks the concepts it is about and gets them times how strongly they are there: a low-rank bilinear form (Kim
et al., ICLR 2017, arXiv 1610.04325), word by word, so that "the cello louder than the violin" can read both apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.model.outputs import SuperTokens

__all__ = ["ConceptReading", "Concepts", "QuestionMatching", "strongest_and_mean"]


def strongest_and_mean(evidence: Tensor, size: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Over the valid ones of K tokens: the maximum and the mean weighted by size, [..., D] each.

    ``evidence`` [..., K, D], ``size`` fp32 [..., K], ``valid`` bool [..., K]; at least one is valid.
    """
    share = torch.where(valid, size, 0.0)
    share = (share / share.sum(-1, keepdim=True)).to(evidence.dtype)
    # Not amax: its gradient asks who equals the maximum, and compiled in bf16 nobody need be: the maximum is rounded.
    strongest = evidence.masked_fill(~valid.unsqueeze(-1), -torch.inf).max(-2).values
    return strongest, (share.unsqueeze(-2) @ evidence).squeeze(-2)


class Concepts(nn.Module):
    """The concepts of a video: [V, 4 * dim], strongest and mean of its visual, then of its audio tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.visual, self.audio = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.token_norm, self.norm = nn.LayerNorm(dim), nn.LayerNorm(4 * dim)

    def forward(self, tokens: SuperTokens) -> Tensor:
        y = self.token_norm(tokens.tokens)  # [V, K, D]
        slots = tokens.visual.tokens.shape[1]
        found: list[Tensor] = []
        for project, part in ((self.visual, slice(None, slots)), (self.audio, slice(slots, None))):
            evidence = F.gelu(project(y[:, part]))
            found += strongest_and_mean(evidence, tokens.size[:, part], tokens.valid[:, part])
        return self.norm(torch.cat(found, dim=-1))


class ConceptReading(nn.Module):
    """Words [Q, L, D] after reading the ``concepts`` [Q, 4 * D] of the videos that they are about."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.ask, self.out = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, words: Tensor, concepts: Tensor) -> Tensor:
        return words + self.out(self.ask(self.norm(words)) * concepts.unsqueeze(1))


class QuestionMatching(nn.Module):
    """Which video of the batch is a question, with its answer, about? A training signal beside the answer.

    An answer is often one bit, "yes"; the question itself tells more: who asks whether the cello is louder than the
    violin has seen a video of both. ``logits[q, v] = scale * cos(text of question and answer q, concepts of video
    v)``; the loss is the cross-entropy over the batch's videos (the InfoNCE of CLIP, arXiv 2103.00020, one way).
    """

    def __init__(self, dim: int, answers: int) -> None:
        super().__init__()
        self.video = nn.Linear(4 * dim, dim)
        self.text, self.answer = nn.Linear(dim, dim), nn.Embedding(answers, dim)
        self.mix = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, words: Tensor, valid: Tensor, label: Tensor, concepts: Tensor) -> Tensor:
        """Logits fp32 [Q, V]: words [Q, L, D] of the questions, their answers int64 [Q], concepts [V, 4 * D]."""
        mean = (words * valid.unsqueeze(-1)).sum(1) / valid.sum(1, keepdim=True)
        text = self.text(mean) + self.answer(label)
        text = F.normalize((text + self.mix(text)).float(), dim=-1)
        return self.scale * (text @ F.normalize(self.video(concepts).float(), dim=-1).T)
