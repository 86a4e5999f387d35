"""Training and evaluation: ``train`` a run folder, ``evaluate`` a model on a split, ``select_key_subset`` of a run."""

from __future__ import annotations

from sparsify.training.evaluate import EvalResult, Prediction, evaluate, write_predictions
from sparsify.training.experiment import train
from sparsify.training.key_subset import select_key_subset
from sparsify.training.metrics import read_metrics
from sparsify.training.stopping import InterruptedRun

__all__ = [
    "EvalResult",
    "InterruptedRun",
    "Prediction",
    "evaluate",
    "read_metrics",
    "select_key_subset",
    "train",
    "write_predictions",
]
