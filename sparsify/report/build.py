"""From run folders to a report: one page, a PNG a chart, and what had to be computed, kept for the next time."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sparsify.config import Config
from sparsify.data.music_avqa import DataRoot
from sparsify.errors import SparsifyError, UsageError
from sparsify.progress import progress_bar
from sparsify.report import cost, figures, figures_cost, figures_probe, kept, probe, tables
from sparsify.report._charts import CHART, Chart
from sparsify.report.asked import Asker
from sparsify.report.page import Section, Table, render
from sparsify.report.published import V1, V2, edition_of
from sparsify.report.runs import Group

__all__ = ["build"]

PAGE = "index.html"


def build(
    groups: Sequence[Group],
    output: Path,
    data: DataRoot | None = None,
    *,
    cache: Path | None = None,
    clips: int | None = None,
    quiet: bool = False,
) -> Path:
    """Write the report on ``groups`` into the folder ``output`` and return its page.

    Args:
        groups: from ``group_runs``.
        output: an existing folder; its ``probe.json`` and ``cost.json`` keep what was computed.
        data: the data folder that judged the runs; None leaves out what checkpoints would have to be asked.
        cache: decoded clips; ``cache/`` in the data folder by default.
        clips: how many videos, spread over the judged split, checkpoints are asked about; None: all.
        quiet: no progress bar.

    Raises:
        DataError: an annotation file of ``data`` cannot be read.
        UsageError: ``output`` cannot be written.
    """
    from matplotlib import rc_context

    asker = Asker(groups, output, data, cache, clips)
    with rc_context(CHART):
        with progress_bar("ask checkpoints", asker.steps(), quiet=quiet or data is None) as advance:
            asked = asker.sections(advance)
        sections = [
            _types(groups, data),
            _subsets(groups),
            _time(groups),
            _curves(groups),
            _cost(groups, output),
            asked["keep"],
            asked["likeness"],
            _kept(groups, data),
            asked["examples"],
            _numbers(groups),
        ]
        for section in sections:
            for chart in section.charts:
                if isinstance(chart, Chart):
                    _write(output / f"{chart.name}.png", chart)
        page = render(_title(groups), _lead(groups), sections, "Made by `sparsify report` from the runs' own files.")
    return _write_text(output / PAGE, page)


def _finished(groups: Sequence[Group]) -> list[Group]:
    """The groups as far as their runs are judged."""
    kept = ((group, tuple(run for run in group.runs if run.evaluation is not None)) for group in groups)
    return [Group(group.name, runs, group.number) for group, runs in kept if runs]


def _by_split(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """The finished groups by the fingerprint of the split that judged them: accuracies of two splits do not compare."""
    judged: dict[str, list[Group]] = {}
    for group in _finished(groups):
        judged.setdefault(str(group.runs[0].fingerprint), []).append(group)
    return judged


def _types(groups: Sequence[Group], data: DataRoot | None) -> Section:
    judged = _by_split(groups)
    charts: list[Chart] = []
    found: list[Table] = []
    missing = [] if judged else ["No run is finished yet, so none is judged: go on with `sparsify train --resume`."]
    for place, (fingerprint, alike) in enumerate(judged.items()):
        edition = edition_of(alike[0].runs[0].by_type(), fingerprint, data)
        published = {"v1": V1, "v2.0": V2}.get(edition or "", ())
        charts.append(figures.radar(alike, published, "radar" if place == 0 else f"radar-{fingerprint}"))
        found.append(tables.by_type(alike))
        if edition and published:
            found.append(tables.published_table(published, edition))
        else:
            missing.append(
                f"Published systems are not shown: the runs were judged by the split {fingerprint}, which is not "
                "MUSIC-AVQA's test split, so their numbers could not be compared."
            )
    lead = (
        "What each run answers rightly, by what is asked, beside the floor: what one gets without looking or listening."
    )
    if len(judged) > 1:
        lead += " The runs were judged by different splits, which are drawn apart."
    return Section("types", "Accuracy by question type", lead, charts, found, missing)


def _subsets(groups: Sequence[Group]) -> Section:
    judged = [alike for alike in _by_split(groups).values() if figures.full_groups(alike)[1]]
    if not judged:
        why = (
            "No run here trained on a key subset. Choose one with `sparsify select RUN --size 25% --unit video`, train "
            "on it with `sparsify train ROOT --subset FILE`, and name both runs to `sparsify report`."
        )
        return Section("subsets", "Full training set against key subsets", missing=[why])
    charts = [figures.subsets(alike, f"subsets-{i}" if i else "subsets") for i, alike in enumerate(judged)]
    whole = all(figures.full_groups(alike)[0] for alike in judged)
    missing = [] if whole else ["No run on the full training set is judged alike, so shares of it are unknown."]
    lead = "How much of the accuracy is left when only a part of the questions is trained on."
    return Section("subsets", "Full training set against key subsets", lead, charts, missing=missing)


def _time(groups: Sequence[Group]) -> Section:
    title = "Training time, dense against sparse"
    if all(group.spread("train_seconds") is None for group in groups):
        return Section("time", title, missing=["No epoch of any run is finished yet."])
    missing = []
    if not any(group.config.dense for group in groups):
        missing.append(
            "No dense run is among these, so there is no ratio to it: train one with `sparsify train ROOT --dense`."
        )
    return Section("time", title, charts=[figures.training_time(groups)], missing=missing)


def _curves(groups: Sequence[Group]) -> Section:
    title = "Accuracy over time"
    if not any(run.history for group in groups for run in group.runs):
        return Section("curves", title, missing=["No epoch of any run is finished yet."])
    return Section("curves", title, charts=[figures.accuracy_over_time(groups)])


def _cost(groups: Sequence[Group], output: Path) -> Section:
    """A chart for every architecture among the groups, masked as much as the group of it that masks most."""
    from sparsify.training.evaluate import masked_keep

    answers = probe.Answers(output / "cost.json")
    charts = []
    alike: dict[str, list[Group]] = {}
    for group in groups:
        config = group.config.to_dict()
        parts = {key: config[key] for key in ("clip", "vision", "audio", "text", "fusion", "merge")}
        parts["merge"] = parts["merge"] | {"enabled": True}
        alike.setdefault(json.dumps(parts, sort_keys=True), []).append(group)
    for number, (key, members) in enumerate(alike.items(), 1):
        keep, model = min(((masked_keep(group.config), group.config) for group in members), key=lambda pair: pair[0])
        asked = {"ask": "cost", "model": key, "keep": keep, "mask": [model.mask.kind, model.mask.stratified]}
        found = answers.get(asked, partial(_count, model))
        variants = [cost.Variant(name, tuple(cost.Stage(*stage) for stage in stages)) for name, stages in found]
        charts.append(figures_cost.by_stage(variants, "; ".join(group.name for group in members), f"by_stage-{number}"))
    lead = "What one video costs: how many tokens each stage works on, and how much it computes."
    return Section("cost", "Tokens and operations by stage", lead, charts)


def _count(config: Config) -> list[list]:
    """``cost.count`` as JSON has it."""
    return [[variant.name, [list(stage) for stage in variant.stages]] for variant in cost.count(config)]


def _kept(groups: Sequence[Group], data: DataRoot | None) -> Section:
    title = "What the key subset keeps"
    selecting = [group for group in groups if group.config.select.skip > 0 and not group.config.dense]
    if not selecting:
        why = (
            "No run here skipped samples, so none knows which ones its epochs came back to: train one with "
            "`sparsify train ROOT --skip 0.5`."
        )
        return Section("kept", title, missing=[why])
    charts, found, missing = [], [], []
    for group in selecting:
        run = group.runs[0]
        try:
            subset = kept.kept_by_paper(run, data)
        except (SparsifyError, OSError) as error:
            missing.append(f"{group.name} is left out: {error}")
            continue
        charts.append(figures_probe.kept_by(subset, f"kept-{group.number + 1}", f"{group.name}, by {subset.unit}"))
        rows = tuple((s.name, f"{s.asked:,}", f"{s.kept:,}", f"{100 * s.share:.1f}") for s in subset.templates)
        found.append(tables.Table(f"{group.name}, by template", ("template", "asked", "kept", "percent"), rows))
    lead = "The quarter of the samples that the paper's rule takes, from what the epochs of a run kept."
    return Section("kept", title, lead if charts else "", charts, found, missing)


def _numbers(groups: Sequence[Group]) -> Section:
    return Section("numbers", "Every number", tables=[tables.all_runs(groups), tables.machines(groups)])


def _title(groups: Sequence[Group]) -> str:
    return "Sparsify: " + (groups[0].name if len(groups) == 1 else f"{len(groups)} settings compared")


def _lead(groups: Sequence[Group]) -> str:
    count = sum(len(group.runs) for group in groups)
    return (
        f"{count} run{'s' if count > 1 else ''}: "
        + "; ".join(
            f"{group.name} (seed{'s' if len(group.runs) > 1 else ''} {', '.join(str(run.seed) for run in group.runs)})"
            for group in groups
        )
        + "."
    )


def _write(path: Path, chart: Chart) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        chart.figure.savefig(temporary, format="png", dpi=200)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"--output {path.parent}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path
