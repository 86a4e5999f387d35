"""The paper's comparison on the built-in data: what masking, merging and selection save, and what they cost.

    python -m benchmarks.reproduce [--data DIR] [--output DIR] [--seeds N] [--jobs N] [--only ROW...]

Renders the data if it is not there, trains every row with every seed (one process each), takes key subsets from the
runs with everything on, and writes results.json, results.md and the report into OUTPUT. What is done is not done
again: a run that was stopped goes on, a finished one is read.

Without a GPU there is one run for every core, each on one thread, as models of this size use cores best. All runs but
the last then have neighbours that do the same kind of work, so their times compare.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparsify.config import Config
from sparsify.data.dataset import cores

SIZE = ("--train", "520", "--val", "160", "--test", "1020", "--questions", "7", "8", "--eval-questions", "15", "16")
# The demo preset, otherwise. As many epochs as in the paper, over few clips: dense has learnt them by heart at the end.
SETTING = ("train.epochs=15", "mask.epochs=[0,-1]", "clip.frames=8")
RISING = 3 * [0.25] + 12 * [0.5]  # keep ratios
HALF = ("mask.schedule=[0.5]",)  # the last epoch, too: as accurate, and the best of the four schedules
SHARE = "25%"
DRAWS = 2000  # of the bootstrap
ASKED = 160  # clips of the test split for the report's curves


class Row(NamedTuple):
    """One line of the comparison: what it changes in the preset, and the subset it trains on."""

    name: str
    options: tuple[str, ...]  # KEY=VALUE
    selector: str | None = None  # of a key subset, taken from the row ``all`` with the same seed


OFF = ("mask.epochs=[0,0]", "merge.enabled=false", "select.skip=0")
ROWS = (
    Row("dense", ("dense=true", "select.skip=0")),
    Row("masking", (*OFF, "mask.epochs=[0,-1]")),
    Row("merging", (*OFF, "merge.enabled=true")),
    Row("selection", (*OFF, "select.skip=0.5")),
    Row("all", ("select.skip=0.5",)),
    Row("all, half throughout", ("select.skip=0.5", *HALF)),
    Row("paper's schedule", ("mask.epochs=[0,3]", "select.skip=0.5", 'select.unit="question"')),
    Row("random subset", (), "random"),
    Row("paper's subset", (), "paper"),
    Row("robust subset", (), "robust"),
)
# With them the whole would take longer than ninety minutes on two cores: only when asked for.
BESIDE = (
    Row("all, questions skipped", ("select.skip=0.5", 'select.unit="question"')),
    Row("all, questions skipped, half throughout", ("select.skip=0.5", 'select.unit="question"', *HALF)),
    Row("all, rising ratios", ("select.skip=0.5", f"mask.schedule={RISING}")),
    Row("all, rising ratios, last epoch whole", ("select.skip=0.5", f"mask.schedule={[*RISING[:-1], 1.0]}")),
    Row("stratified subset", (), "stratified"),
)


class Paths(NamedTuple):
    data: Path
    output: Path
    jobs: int = 1  # runs at a time

    def run(self, row: Row, seed: int) -> Path:
        name = "".join(c for c in row.name.replace(" ", "-") if c.isalnum() or c == "-")
        return self.output / f"{name}-{seed}"


def sparsify(*arguments: object, jobs: int = 1) -> None:
    """``sparsify ARGUMENTS`` in a process of its own, with its share of the cores where ``jobs`` run at a time."""
    threads = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, cores() // jobs))}
    command = [sys.executable, "-m", "sparsify", *map(str, arguments)]
    done = subprocess.run(command, check=False, env=os.environ | threads)
    if done.returncode:
        raise SystemExit(done.returncode)


def at_once(tasks: Sequence[Callable[[], object]], jobs: int) -> None:
    """Run ``tasks``, ``jobs`` at a time and begun in their order; after one that fails none is begun."""
    failed = threading.Event()

    def run(task: Callable[[], object]) -> None:
        if failed.is_set():
            return
        try:
            task()
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(run, task) for task in tasks]:
            future.result()


def train(row: Row, seed: int, paths: Paths) -> None:
    """Train ``row`` unless it is done."""
    options = [*SETTING, *row.options, f"train.seed={seed}"]
    if row.selector is not None:
        options.append(f"select.subset={json.dumps(str(subset(row.selector, seed, paths)))}")
    train_once(paths.data, paths.run(row, seed), options, paths.jobs)


def train_once(root: Path, run: Path, options: Sequence[str], jobs: int, *more: object) -> None:
    """Train ``run``; go on where it was stopped. What another setting left there ends the program."""
    file = run / "config.json"
    if file.exists():
        found = Config.from_dict(json.loads(file.read_text(encoding="utf-8")), str(file)).to_dict()
        wanted = Config.preset("demo").with_options(options).to_dict()
        if other := [key for key in wanted if found[key] != wanted[key]]:
            raise SystemExit(
                f"{run}: was trained with {other[0]} = {found[other[0]]}, this comparison has {wanted[other[0]]}: "
                "remove it, or choose another --output"
            )
    if not (run / "results.json").exists():
        how = ["--resume"] if file.exists() else [part for option in options for part in ("--set", option)]
        sparsify("train", root, "--output", run, *more, *how, jobs=jobs)


def subset(selector: str, seed: int, paths: Paths) -> Path:
    """The key subset of the run ``all`` with this seed: ids of a quarter of the training videos."""
    file = paths.output / f"subset-{selector}-{seed}.json"
    if not file.exists():
        source = paths.run(next(row for row in ROWS if row.name == "all"), seed)
        options = ("--unit", "video", "--size", SHARE, "--selector", selector, "--seed", seed)
        sparsify("select", source, *options, "--output", file)
    return file


def ungrouped_seconds(paths: Paths) -> float:
    """Seconds of one dense epoch in which each question encodes its video anew, as published trainers do.

    The same questions, each about a video of its own: a second root whose videos are links to the first one's.
    """
    root, run = paths.output / "ungrouped", paths.output / "ungrouped-dense"
    if not (run / "results.json").exists():
        _ungroup(paths.data, root)
    options = (*SETTING, "dense=true", "train.epochs=1")
    train_once(root, run, options, paths.jobs, "--cache", paths.data / "cache")
    return json.loads((run / "results.json").read_text(encoding="utf-8"))["seconds"]["train"]


def _ungroup(source: Path, root: Path) -> None:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "videos").mkdir(exist_ok=True)
    for split in ("train", "val"):
        rows = json.loads((source / "annotations" / f"avqa-{split}.json").read_text(encoding="utf-8"))
        for row in rows if split == "train" else []:
            video = f"{row['video_id']}-{row['question_id']}"
            link = root / "videos" / f"{video}.mp4"
            if not link.exists():
                link.symlink_to((source / "videos" / f"{row['video_id']}.mp4").resolve())
            row["video_id"] = video
        if split == "val":
            for name in {row["video_id"] for row in rows}:
                link = root / "videos" / f"{name}.mp4"
                if not link.exists():
                    link.symlink_to((source / "videos" / f"{name}.mp4").resolve())
        (root / "annotations" / f"avqa-{split}.json").write_text(json.dumps(rows), encoding="utf-8")


class Outcome(NamedTuple):
    """A row over its seeds. Times are of training alone, in multiples of dense with the same seed."""

    name: str
    accuracy: list[float]  # of each seed, on test
    seconds: list[float]
    time: float  # mean over seeds
    whole: float  # the same with evaluation after each epoch and in the end, and saving
    time_to_dense: float | None  # until the validation accuracy that dense ends with; None: some seed never gets there
    not_encoded: float  # share of the videos of all epochs
    difference: tuple[float, float, float]  # to dense, in points: mean, lower and upper end of the 95 % interval


def outcomes(rows: Sequence[Row], seeds: Sequence[int], paths: Paths) -> Iterator[Outcome]:
    dense = [_read(paths.run(ROWS[0], seed)) for seed in seeds]
    right = [_right(paths.run(ROWS[0], seed)) for seed in seeds]
    for row in rows:
        runs = [_read(paths.run(row, seed)) for seed in seeds]
        pairs = [(_right(paths.run(row, seed)), base) for seed, base in zip(seeds, right, strict=True)]
        seconds = [run["seconds"]["train"] for run in runs]
        reached = [
            _seconds_to(run, base["history"][-1]["val_accuracy"]) / base["seconds"]["train"]
            for run, base in zip(runs, dense, strict=True)
            if _seconds_to(run, base["history"][-1]["val_accuracy"]) is not None
        ]
        yield Outcome(
            row.name,
            [run["evaluation"]["unmasked"]["accuracy"] for run in runs],
            seconds,
            statistics.fmean(s / base["seconds"]["train"] for s, base in zip(seconds, dense, strict=True)),
            statistics.fmean(_whole(run) / _whole(base) for run, base in zip(runs, dense, strict=True)),
            statistics.fmean(reached) if len(reached) == len(runs) else None,
            statistics.fmean(run["selection"]["videos_skipped"] for run in runs),
            bootstrap(pairs),
        )


def _whole(run: dict[str, Any]) -> float:
    return sum(run["seconds"][part] for part in ("train", "evaluate", "save"))


def _read(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


def _right(run: Path) -> dict[int, bool]:
    """Which questions of the test split were answered right."""
    answers = json.loads((run / "predictions.json").read_text(encoding="utf-8"))
    return {answer["question_id"]: answer["correct"] for answer in answers}


def _seconds_to(run: dict[str, Any], accuracy: float) -> float | None:
    """Seconds of training until an epoch's validation accuracy was at least ``accuracy``."""
    return next((line["train_seconds"] for line in run["history"] if line["val_accuracy"] >= accuracy), None)


def bootstrap(pairs: Sequence[tuple[dict[int, bool], dict[int, bool]]], seed: int = 0) -> tuple[float, float, float]:
    """Mean difference in points, and its 95 % interval: questions and seeds are drawn anew, ours and dense together.

    ``pairs``: for each seed the right answers of a run and of dense, by question id.
    """
    ids = sorted(set.intersection(*({*ours} & {*base} for ours, base in pairs)))
    differences = torch.tensor([[float(ours[i]) - float(base[i]) for i in ids] for ours, base in pairs])  # [S, Q]
    draw = torch.Generator().manual_seed(seed)
    means = torch.empty(DRAWS)
    for n in range(DRAWS):
        questions = torch.randint(len(ids), (len(ids),), generator=draw)
        seeds = torch.randint(len(pairs), (len(pairs),), generator=draw)
        means[n] = differences[seeds][:, questions].mean()
    low, high = (100 * means.quantile(torch.tensor([0.025, 0.975]))).tolist()
    return 100 * float(differences.mean()), low, high


def render(found: Sequence[Outcome], seeds: Sequence[int], ungrouped: float) -> str:
    """Markdown: a row each, with seeds' spread. ``ungrouped``: seconds of a dense run that groups no questions."""
    dense = statistics.fmean(found[0].seconds)
    lines = [
        f"| row | test accuracy, % ({len(seeds)} seeds: mean, least to most) | against dense, points (95 %) "
        "| training time / dense | with evaluation and saving / dense | training time / dense, each question encoding "
        "anew | time to dense's accuracy / dense | videos not encoded |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        percent = [100 * value for value in row.accuracy]
        mean, low, high = row.difference
        reached = "never" if row.time_to_dense is None else f"{row.time_to_dense:.2f}"
        lines.append(
            f"| {row.name} | {statistics.fmean(percent):.1f} ({min(percent):.1f} to {max(percent):.1f}) "
            f"| {mean:+.1f} ({low:+.1f} to {high:+.1f}) | {row.time:.2f} | {row.whole:.2f} "
            f"| {row.time * dense / ungrouped:.3f} "
            f"| {reached} | {row.not_encoded:.0%} |"
        )
    return "\n".join(lines)


def every_run(rows: Sequence[Row], seeds: Sequence[int], paths: Paths) -> str:
    """Markdown: each run's own numbers."""
    lines = [
        "| row | seed | test, % | masked, % | best epoch | validation there, % | training, s | evaluation, s "
        "| saving, s | steps | videos encoded | videos, questions not trained on |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for seed in seeds:
            run = _read(paths.run(row, seed))
            accuracy = {name: f"{100 * result['accuracy']:.2f}" for name, result in run["evaluation"].items()}
            skipped = run["selection"]
            lines.append(
                f"| {row.name} | {seed} | {accuracy['unmasked']} | {accuracy.get('masked', '')} "
                f"| {run['best']['epoch'] + 1} | {100 * run['best']['val_accuracy']:.2f} "
                f"| {run['seconds']['train']:.0f} | {run['seconds']['evaluate']:.0f} | {run['seconds']['save']:.1f} "
                f"| {run['steps']} | {sum(e['videos'] for e in run['history'])} "
                f"| {skipped['videos_skipped']:.0%}, {skipped['questions_skipped']:.0%} |"
            )
    return "\n".join(lines)


def by_type(rows: Sequence[Row], seeds: Sequence[int], paths: Paths) -> str:
    """Markdown: accuracy on test by question type, mean over seeds, beside the floor of who never looks."""
    scores = {row.name: [_types(paths.run(row, seed)) for seed in seeds] for row in rows}
    first = scores[rows[0].name][0]
    lines = ["| | floor | " + " | ".join(scores) + " |", "|---" * (len(scores) + 2) + "|"]
    for name in first:
        means = (statistics.fmean(run[name]["accuracy"] for run in runs) for runs in scores.values())
        cells = " | ".join(f"{100 * mean:.1f}" for mean in means)
        lines.append(f"| {name} | {100 * first[name]['floor']:.1f} | {cells} |")
    return "\n".join(lines)


def _types(run: Path) -> dict[str, dict[str, float]]:
    scores = _read(run)["evaluation"]["unmasked"]["scores"]
    return scores["types"] | {"overall": scores["overall"]}


def provenance(runs: Sequence[Path]) -> str:
    """Markdown: what code, machine and data the runs are of, apart where they differ; the first's training split."""
    said: dict[str, list[str]] = {}
    for run in runs:
        said.setdefault(_origin(_read(run)), []).append(run.name)
    lines = [*said] if len(said) == 1 else [f"- {', '.join(names)}: {origin}" for origin, names in said.items()]
    return "\n".join(lines) + f" Trained on {_split(_read(runs[0]), 'train')}, subsets on a quarter of it."


def _origin(results: dict[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    splits = ", ".join(f"{name} {_split(results, name)}" for name in results["splits"] if name != "train")
    return (
        f"Commit {versions.get('commit', 'not recorded')}; {machine['name']}, {machine['cores']} cores, "
        f"{machine['threads']} thread(s) a run on {machine['device']}; torch {versions['torch']}, "
        f"{results['precision']['name']}. {splits}."
    )


def _split(results: dict[str, Any], name: str) -> str:
    split = results["splits"][name]
    return f"{split['questions']:,} questions on {split['videos']:,} videos ({split['fingerprint']})"


def chosen(only: Sequence[str] | None) -> list[Row]:
    """The rows of the table: those named and dense, which they are compared with; all of ``ROWS`` by default."""
    names = [row.name for row in ROWS] if only is None else ["dense", *only]
    return [row for row in (*ROWS, *BESIDE) if row.name in names]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", metavar="DIR", type=Path, default=Path("data/reproduce"))
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--seeds", metavar="N", type=int, default=3, help="runs a row (default: 3)")
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=int,
        default=1 if torch.cuda.is_available() else cores(),
        help="runs at a time, each with its share of the cores (default: one a core; 1 with a GPU)",
    )
    asked = ", ".join(f"{row.name!r}" for row in BESIDE)
    only = f"these, and dense; not made otherwise: {asked}"
    parser.add_argument("--only", metavar="ROW", nargs="+", choices=[row.name for row in (*ROWS, *BESIDE)], help=only)
    args = parser.parse_args(arguments)
    paths, seeds = Paths(args.data, args.output, max(1, args.jobs)), range(args.seeds)
    if not (args.data / "annotations" / "avqa-test.json").exists():
        sparsify("synth", args.data, *SIZE)
    rows = chosen(args.only)
    whole = [row for row in ROWS if row.name == "all" and row not in rows]
    needed = rows + (whole if any(row.selector for row in rows) else [])  # subsets are taken from it
    first = [partial(train, row, seed, paths) for seed in seeds for row in needed if row.selector is None]
    subsets = [partial(train, row, seed, paths) for seed in seeds for row in needed if row.selector is not None]
    at_once(first, paths.jobs)
    at_once([partial(ungrouped_seconds, paths), *subsets], paths.jobs)
    epoch = ungrouped_seconds(paths)
    ungrouped = epoch * len(_read(paths.run(ROWS[0], 0))["history"])
    found = list(outcomes(rows, seeds, paths))
    table = render(found, seeds, ungrouped)
    parts = (
        provenance([paths.run(row, seed) for row in rows for seed in seeds]),
        table,
        f"One dense epoch with each question encoding its video anew: {epoch:.0f} s.",
        by_type(rows, seeds, paths),
        every_run(rows, seeds, paths),
    )
    (args.output / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (args.output / "results.json").write_text(json.dumps([row._asdict() for row in found], indent=1), encoding="utf-8")
    print(table)
    runs = {paths.run(row, seed): row.name for row in rows for seed in seeds}
    labels = [part for run, name in runs.items() for part in ("--label", f"{run}={name}")]
    asked = ("--data", args.data, "--clips", ASKED)
    sparsify("report", *runs, *labels, *asked, "--output", args.output / "report")
    return 0


if __name__ == "__main__":
    sys.exit(main())
