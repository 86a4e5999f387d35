"""What the commands that take a RUN share: finding the checkpoint in it, loading the model, finding the clip cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.errors import CheckpointError
from sparsify.seal import standing

if TYPE_CHECKING:
    from sparsify.config import Config
    from sparsify.data.cache import ClipCache
    from sparsify.model import SparsifyModel

__all__ = ["RUN_HELP", "checkpoint_folder", "load_model", "open_cache"]

RUN_HELP = "a run folder of `sparsify train` (its best/ is used) or a checkpoint folder"


def checkpoint_folder(run: Path) -> Path:
    """The checkpoint that ``run`` stands for: the ``best/`` of a run folder, else itself; else ``CheckpointError``."""
    if not run.exists():
        raise CheckpointError(f"RUN {run} does not exist; expected {RUN_HELP}")
    if not run.is_dir():
        raise CheckpointError(f"RUN {run} is a file; expected {RUN_HELP}")
    best = standing(run / "best")
    if best.is_dir():
        return best
    if (run / "metrics.jsonl").exists() or (run / "last").is_dir():
        raise CheckpointError(f"RUN {run} has no best/ yet: no epoch of it was evaluated")
    if not (run / "config.json").exists():
        raise CheckpointError(f"RUN {run} holds no config.json; expected {RUN_HELP}")
    return run


def load_model(run: Path) -> SparsifyModel:
    """The model of ``run``, in evaluation mode, on the GPU if there is one."""
    folder = checkpoint_folder(run)
    import torch

    from sparsify.model import SparsifyModel

    return SparsifyModel.from_pretrained(folder).to("cuda" if torch.cuda.is_available() else "cpu")


def open_cache(folder: Path, config: Config) -> ClipCache:
    """The cache of decoded clips in ``folder``."""
    from sparsify.data.cache import ClipCache

    return ClipCache(folder, config)
