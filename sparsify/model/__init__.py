"""The model. ``SparsifyModel`` is all that most code needs; importing it imports torch."""

from __future__ import annotations

from sparsify.model.model import ANSWER_COUNT, SparsifyModel
from sparsify.model.outputs import ModalityTokens, SuperTokens

__all__ = ["ANSWER_COUNT", "ModalityTokens", "SparsifyModel", "SuperTokens"]
