"""Training and evaluation: ``train`` a run folder, ``evaluate`` a model on a split."""

from __future__ import annotations

from sparsify.training.evaluate import EvalResult, Prediction, evaluate, write_predictions
from sparsify.training.experiment import train
from sparsify.training.metrics import read_metrics
from sparsify.training.stopping import InterruptedRun

__all__ = ["EvalResult", "InterruptedRun", "Prediction", "evaluate", "read_metrics", "train", "write_predictions"]
