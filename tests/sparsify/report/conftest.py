"""Fabricated run folders: what `sparsify train` leaves, with numbers that a test chose."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sparsify.config import Config
from sparsify.data.templates import TYPES


def fabricate(
    folder: Path,
    changes: dict[str, Any] | None = None,
    *,
    accuracy: float = 0.7,
    floor: float = 0.4,
    seconds: float = 300.0,
    epochs: Sequence[float] = (0.5, 0.6, 0.7),
    videos_skipped: float = 0.0,
    asked: Sequence[int] = (100,) * 9,
    questions: int = 4000,
    fingerprint: str = "0123456789ab",
    finished: bool = True,
) -> Path:
    """A run folder of ``Config.preset("demo")`` with ``changes``; type i is answered with ``accuracy + i / 100``."""
    config = Config.preset("demo").replace(**{"train.epochs": len(epochs)} | (changes or {}))
    history = [
        {
            "epoch": epoch,
            "loss": 1.0,
            "keep": config.keep_at(epoch),
            "val_loss": 1.0,
            "val_accuracy": value,
            "val_floor": floor,
            "super_tokens": 20.0,
            "questions": questions,
            "videos": 1000 - round(1000 * videos_skipped),
            "questions_skipped": 0,
            "videos_skipped": round(1000 * videos_skipped),
            "train_seconds": seconds * (epoch + 1) / len(epochs),
            "evaluate_seconds": 1.0,
        }
        for epoch, value in enumerate(epochs)
    ]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    lines = [{"kind": "epoch", "step": 10 * (line["epoch"] + 1)} | line for line in history]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if not finished:
        return folder
    types = {
        str(kind): {"asked": n, "scored": n, "correct": 0, "accuracy": accuracy + i / 100, "floor": floor - i / 100}
        for i, (kind, n) in enumerate(zip(TYPES, asked, strict=True))
    }
    evaluation = {
        "fingerprint": fingerprint,
        "keep": 1.0,
        "super_tokens": 20.0,
        "accuracy": accuracy,
        "scores": {"overall": {"floor": floor}, "types": types},
    }
    results = {
        "config": config.to_dict(),
        "history": history,
        "judged": "test",
        "evaluation": {"unmasked": evaluation},
        "splits": {"train": {"questions": questions, "fingerprint": "aaaaaaaaaaaa"}},
        "selection": {"videos_skipped": videos_skipped, "questions_skipped": videos_skipped},
        "seconds": {"prepare": 1.0, "train": seconds, "evaluate": 3.0, "total": seconds + 4},
        "parameters": 1_000_000,
        "machine": {"name": "a processor", "device": "cpu", "threads": 2, "processes": 1},
        "versions": {"sparsify": "0.1", "torch": "2.13.0"},
        "precision": {"name": "fp32"},
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """``make_run("name", {"dense": True}, accuracy=0.7, ...)``: a run folder under ``tmp_path``."""

    def make(name: str, changes: dict[str, Any] | None = None, **numbers: Any) -> Path:
        return fabricate(tmp_path / name, changes, **numbers)

    return make
