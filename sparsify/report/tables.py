"""The numbers of a report as tables: every run, accuracy by question type, and published systems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsify.data.templates import TYPES
from sparsify.progress import format_seconds
from sparsify.report.page import Table
from sparsify.report.published import Published
from sparsify.report.runs import Group, Run, Spread

__all__ = ["all_runs", "by_type", "machines", "published_table"]

NONE = "-"


def by_type(groups: Sequence[Group]) -> Table:
    """A row a question type, a column a group; means over seeds, with the spread where there are several."""
    rows = []
    for kind in TYPES:
        floors = [run.by_type()[str(kind)]["floor"] for group in groups for run in group.runs]
        found = [_spread(group.type_accuracy(str(kind))) for group in groups]
        rows.append((str(kind).replace("/", " ").replace("Audio Visual", "Audio-Visual"), _percent(floors[0]), *found))
    rows.append(
        ("overall", _percent(groups[0].runs[0].floor), *(_spread(group.spread("accuracy")) for group in groups))
    )
    return Table("Accuracy by question type, percent", ("type", "floor", *(g.name for g in groups)), tuple(rows))


def published_table(rows: Sequence[Published], edition: str) -> Table:
    """Published overall accuracies with their sources."""
    return Table(
        f"Published, MUSIC-AVQA {edition} test, percent (by type: as a comparison table quotes the sources)",
        ("system", "overall", "source"),
        tuple((row.name, f"{row.overall:.2f}", row.source) for row in rows),
        text=(2,),
    )


def all_runs(groups: Sequence[Group]) -> Table:
    """A row a run, with everything that was measured."""
    head = (
        "run", "seed", "accuracy", "floor", "masked", "best val.", "at epoch", "epochs", "trained in", "evaluated in",
        "in all", "videos not encoded", "questions skipped", "super-tokens", "questions", "parameters", "judged",
        "fingerprint",
    )  # fmt: skip
    return Table("Every run; accuracies in percent", head, tuple(_row(g.name, run) for g in groups for run in g.runs))


def _row(name: str, run: Run) -> tuple[str, ...]:
    results: dict[str, Any] = dict(run.results or {})
    masked = results.get("evaluation", {}).get("masked")
    seconds = results.get("seconds", {})
    best = max(run.history, key=lambda line: line["val_accuracy"], default=None)
    left_out, skipped = run.not_encoded(), run.questions_skipped()
    return (
        name,
        str(run.seed),
        _percent(run.accuracy) if run.results else "not finished",
        _percent(run.floor),
        f"{_percent(masked['accuracy'])} (at {masked['keep']:.0%})" if masked else NONE,
        NONE if best is None else _percent(best["val_accuracy"]),
        NONE if best is None else str(best["epoch"] + 1),
        f"{len(run.history)} of {run.config.train.epochs}",
        *(_time(seconds.get(key)) for key in ("train", "evaluate", "total")),
        NONE if left_out is None else f"{left_out:.1%}",
        NONE if skipped is None else f"{skipped:.1%}",
        f"{run.evaluation['super_tokens']:.1f}" if run.evaluation else NONE,
        f"{run.train_questions:,}" if run.train_questions else NONE,
        f"{results['parameters']:,}" if "parameters" in results else NONE,
        str(results.get("judged", NONE)),
        run.fingerprint or NONE,
    )


def machines(groups: Sequence[Group]) -> Table:
    """A row a run: where it ran and with which code."""
    rows = []
    for group in groups:
        for run in group.runs:
            results: dict[str, Any] = dict(run.results or {})
            machine, versions = results.get("machine", {}), results.get("versions", {})
            rows.append(
                (
                    group.name,
                    str(run.seed),
                    str(results.get("commit") or versions.get("commit") or "not recorded"),
                    versions.get("sparsify", NONE),
                    versions.get("torch", NONE),
                    str(machine.get("name") or NONE),
                    str(machine.get("device", NONE)),
                    str(machine.get("threads", NONE)),
                    str(machine.get("processes", NONE)),
                    results.get("precision", {}).get("name", NONE),
                    *(
                        results.get("splits", {}).get(name, {}).get("fingerprint", NONE)
                        for name in ("train", "val", "test")
                    ),
                    str(run.folder),
                )
            )
    head = (
        "run", "seed", "commit", "sparsify", "torch", "machine", "device", "threads", "processes", "precision",
        "train split", "val split", "test split", "folder",
    )  # fmt: skip
    return Table("Code, machine and data of every run", head, tuple(rows), text=(2, 5, 13))


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.2f}"


def _spread(found: Spread | None) -> str:
    if found is None:
        return NONE
    mean = f"{100 * found.mean:.2f}"
    return mean if found.seeds == 1 else f"{mean} ({100 * found.low:.1f} to {100 * found.high:.1f})"


def _time(seconds: float | None) -> str:
    return NONE if seconds is None else format_seconds(seconds)
