"""The errors a user of Sparsify can meet: one sentence each, naming what was wrong and what was expected."""

from __future__ import annotations

__all__ = [
    "SparsifyError",
    "DataError",
    "MediaError",
    "TruncatedMediaError",
    "CheckpointError",
    "ConfigError",
    "UsageError",
    "TrainingError",
]


class SparsifyError(Exception):
    """Base of every expected error. The command line prints it in one line and exits with ``exit_code``."""

    exit_code = 1


class UsageError(SparsifyError):
    """The command cannot be carried out as it was given (an empty question, a run folder already in use)."""

    exit_code = 2


class ConfigError(UsageError):
    """An unknown preset or key, or a value outside its range."""


class DataError(SparsifyError):
    """An annotation file or data folder is missing or malformed; names the file, the row and the field."""

    exit_code = 3


class MediaError(SparsifyError):
    """A video cannot be read; names the file and the reason."""

    exit_code = 4


class TruncatedMediaError(MediaError):
    """Less than 90 % of the declared duration of a video can be read."""


class CheckpointError(SparsifyError):
    """A checkpoint folder is incomplete, of another version, or does not fit the model."""

    exit_code = 5


class TrainingError(SparsifyError):
    """Training cannot go on (a loss that is not finite); names the step and its videos."""
