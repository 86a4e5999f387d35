"""The model: ``SparsifyModel`` is all that most code needs; the masked encoders are for other models, too."""

from __future__ import annotations

from sparsify.model.masked import MaskedHTSAT, MaskedSwinV2
from sparsify.model.model import ANSWER_COUNT, SparsifyModel
from sparsify.model.outputs import ModalityTokens, SuperTokens
from sparsify.model.plan import UnitPlan

__all__ = [
    "ANSWER_COUNT",
    "MaskedHTSAT",
    "MaskedSwinV2",
    "ModalityTokens",
    "SparsifyModel",
    "SuperTokens",
    "UnitPlan",
]
