"""Run folders as a report reads them: loaded, named after what they switch on, and grouped over their seeds.

A run is named by what its configuration does: ``dense``; or ``masking``, ``merging`` and ``selection`` as far as they
are on; then the key subset it trained on, and what it was not let see or hear. Runs of one name that differ in nothing
but the seed are one group. Runs of one name that differ in more are told apart by the keys that differ.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sparsify.config import Config
from sparsify.errors import CheckpointError, ConfigError
from sparsify.seal import standing

__all__ = ["Group", "Run", "Spread", "group_runs", "load_run", "spread"]

# What may differ between the seeds of one group: where and how fast, not what is learnt.
_FREE = ("train.seed", "train.workers", "train.save_seconds", "train.keep_last", "select.subset", "version")


class Spread(NamedTuple):
    """A number over seeds: its mean, its least and its largest value, and how many there are."""

    mean: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Subset:
    """The key subset that a run trained on."""

    selector: str  # paper, random, ...; the file's name where the file does not say
    seed: int


@dataclass(frozen=True)
class Run:
    """One run folder. ``results`` is None while the run is not finished."""

    folder: Path
    name: str
    named: bool  # by the user
    config: Config
    results: Mapping[str, Any] | None
    history: Sequence[Mapping[str, Any]]  # an entry an epoch: seconds so far, validation accuracy, ...
    subset: Subset | None

    @property
    def seed(self) -> int:
        return self.config.train.seed

    @property
    def best(self) -> Path | None:
        """The checkpoint of the best epoch, if it is there."""
        folder = standing(self.folder / "best")
        return folder if (folder / "model.safetensors").is_file() else None

    @property
    def evaluation(self) -> Mapping[str, Any] | None:
        """The evaluation that counts: masked where the configuration evaluates masked, else unmasked."""
        if self.results is None:
            return None
        found = self.results["evaluation"]
        return found["masked" if self.config.mask.eval and "masked" in found else "unmasked"]

    @property
    def accuracy(self) -> float | None:
        """Share in [0, 1] of the judged split's questions."""
        return None if self.evaluation is None else self.evaluation["accuracy"]

    @property
    def floor(self) -> float | None:
        return None if self.evaluation is None else self.evaluation["scores"]["overall"]["floor"]

    @property
    def fingerprint(self) -> str | None:
        """Of the split that judged the run."""
        return None if self.evaluation is None else self.evaluation["fingerprint"]

    @property
    def train_questions(self) -> int | None:
        return None if self.results is None else self.results["splits"]["train"]["questions"]

    @property
    def train_seconds(self) -> float | None:
        """Seconds of training alone: no decoding, no evaluation."""
        if self.results is not None:
            return self.results["seconds"]["train"]
        return self.history[-1]["train_seconds"] if self.history else None

    @property
    def accuracy_at_end(self) -> float | None:
        """Validation accuracy of the last epoch."""
        return self.history[-1]["val_accuracy"] if self.history else None

    def by_type(self) -> dict[str, Mapping[str, Any]]:
        """Of each of the nine types: asked, scored, correct, accuracy and floor."""
        return {} if self.evaluation is None else dict(self.evaluation["scores"]["types"])

    def not_encoded(self) -> float | None:
        """Share of the videos of all epochs that selection left out, in [0, 1]; 0 without selection."""
        if self.results is not None and "selection" in self.results:
            return self.results["selection"]["videos_skipped"]
        skipped = sum(line.get("videos_skipped", 0) for line in self.history)
        seen = sum(line["videos"] for line in self.history)
        return skipped / (skipped + seen) if seen else None

    def questions_skipped(self) -> float | None:
        """Share of the questions of all epochs that selection left out, in [0, 1]; None while the run goes on."""
        return None if self.results is None else self.results.get("selection", {}).get("questions_skipped")

    def seconds_to(self, accuracy: float) -> float | None:
        """Seconds of training until an epoch's validation accuracy was at least ``accuracy``; None: never."""
        return next((line["train_seconds"] for line in self.history if line["val_accuracy"] >= accuracy), None)


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed."""

    name: str
    runs: tuple[Run, ...]
    number: int  # its place, which decides its colour and mark in every figure

    @property
    def config(self) -> Config:
        return self.runs[0].config

    def spread(self, name: str) -> Spread | None:
        """``spread`` of the attribute ``name`` of the runs, or of what it returns."""
        values = (getattr(run, name) for run in self.runs)
        return spread(value() if callable(value) else value for value in values)

    def type_accuracy(self, kind: str) -> Spread | None:
        """``spread`` of the accuracy, a share in [0, 1], on the questions of type ``kind``."""
        return spread(run.by_type().get(kind, {}).get("accuracy") for run in self.runs)


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean, least, largest and number of the values that are known; None for none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return Spread(statistics.fmean(known), min(known), max(known), len(known)) if known else None


def load_run(folder: Path, name: str | None = None) -> Run:
    """The run in ``folder``, named ``name`` or after its configuration.

    Raises ``CheckpointError`` for a folder that is no run of `sparsify train`, or whose files are not its.
    """
    if not folder.is_dir():
        raise CheckpointError(f"RUN {folder}: expected a run folder of `sparsify train`, found no folder")
    if not (folder / "config.json").is_file() or not (folder / "metrics.jsonl").is_file():
        raise CheckpointError(
            f"RUN {folder}: expected a run folder of `sparsify train`, with config.json and metrics.jsonl in it"
        )
    try:
        config = Config.from_dict(_json(folder / "config.json"), str(folder / "config.json"))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    results = None
    if (folder / "results.json").is_file():
        results = _json(folder / "results.json")
        if not isinstance(results, dict) or not {"evaluation", "history", "seconds", "splits"} <= set(results):
            raise CheckpointError(f"{folder / 'results.json'}: is not the results of a run")
    history = results["history"] if results is not None else _epochs(folder / "metrics.jsonl")
    subset = _subset(config)
    return Run(folder, name or describe(config, subset), name is not None, config, results, history, subset)


def describe(config: Config, subset: Subset | None) -> str:
    """What the configuration switches on, in a few words."""
    masked = any(config.keep_at(epoch) < 1 for epoch in range(config.train.epochs))
    on = {
        "masking": masked,
        "merging": config.merge.enabled,
        "selection": config.select.skip > 0,
    }
    name = "dense" if config.dense or not any(on.values()) else " + ".join(part for part, used in on.items() if used)
    if subset is not None:
        name += f", {subset.selector} subset"
    without = {"blind": "blind", "deaf": "deaf", "textonly": "questions alone"}
    return name if config.train.inputs == "both" else f"{name}, {without[config.train.inputs]}"


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first run; what is ``dense`` comes first: the others are held against it."""
    found: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        key = "" if run.named else json.dumps(_what(run), sort_keys=True)
        found.setdefault(run.name, {}).setdefault(key, []).append(run)
    members: list[tuple[str, list[Run]]] = []
    for name, alike in found.items():
        keys = [json.loads(key) if key else {} for key in alike]
        differing = [key for key in keys[0] if any(other.get(key) != keys[0][key] for other in keys)]
        for what, same in zip(keys, alike.values(), strict=True):
            marks = ", ".join(f"{key.partition('.')[2] or key} {_short(what[key])}" for key in differing)
            members.append((f"{name} ({marks})" if marks else name, same))
    members.sort(key=lambda member: not member[1][0].config.dense)  # stable
    return [
        Group(name, tuple(sorted(same, key=lambda run: run.seed)), number)
        for number, (name, same) in enumerate(members)
    ]


def _what(run: Run) -> dict[str, Any]:
    """The configuration, flat, without what seeds of a group may differ in; and how much a subset holds."""
    flat: dict[str, Any] = {}
    for section, values in run.config.to_dict().items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            flat[section] = values
    questions = {"questions": run.train_questions} if run.subset is not None else {}
    return {key: value for key, value in flat.items() if key not in _FREE} | questions


def _short(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def _subset(config: Config) -> Subset | None:
    """Which subset it is: from its file as far as that is still there, else from its name."""
    if config.select.subset is None:
        return None
    path = Path(config.select.subset)
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
        return Subset(str(notes["selector"]), int(notes.get("seed", 0)))
    except (OSError, ValueError, KeyError, TypeError):
        return Subset(path.stem, 0)


def _epochs(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if line["kind"] == "epoch"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is not the measurements of a run ({error})") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
