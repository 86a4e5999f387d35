"""What the model returns: plain named tuples of tensors.

Sizes: V videos, N tokens of one modality that were encoded, K super-tokens, D ``fusion.dim``. A *dense token index*
counts a modality's tokens as if nothing were masked: ``frame * cells + row * side + column`` (segment in place of frame
for audio), where a frame has ``cells = side * side`` tokens after the last stage.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["ModalityTokens", "SuperTokens", "TrainingLogits"]


class ModalityTokens(NamedTuple):
    """One modality after merging, and what became of every token that went in."""

    tokens: Tensor  # [V, K, D]
    size: Tensor  # fp32 [V, K]: tokens merged into each; 0 in empty slots
    position: Tensor  # int64 [V, K]: dense token index of the key token itself; 0 in empty slots
    valid: Tensor  # bool [V, K]
    assign: Tensor  # int64 [V, N]: the slot that each encoded token joined
    scores: Tensor | None  # fp32 [V, N]: what the other modality attends to, sums to 1; None where nothing is merged
    kept: Tensor  # int64 [V, N]: dense token index of every encoded token, ascending


class SuperTokens(NamedTuple):
    """A video, encoded: what questions attend to. Visual slots come first, audio slots after them."""

    tokens: Tensor  # [V, K, D]
    size: Tensor  # fp32 [V, K]
    valid: Tensor  # bool [V, K]
    time: Tensor  # fp32 [V, K]: seconds from the start of the clip; 0 in empty slots
    visual: ModalityTokens
    audio: ModalityTokens

    @property
    def merged(self) -> bool:
        """Whether a token may stand for several, and slots may be empty."""
        return self.visual.scores is not None


class TrainingLogits(NamedTuple):
    """What a training step needs of Q questions about the V videos of its batch."""

    answer: Tensor  # fp32 [Q, 42]
    matching: Tensor | None  # fp32 [Q, V]: of each video being the one that a question is about; None if not asked for
