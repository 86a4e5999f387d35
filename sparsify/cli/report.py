"""``sparsify report``: runs as one page of charts and tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sparsify.cli._parser import count
from sparsify.errors import UsageError

__all__ = ["add", "run"]

DESCRIPTION = """\
Writes one HTML page that needs nothing beside it, and its charts as PNGs: accuracy by question type, key subsets,
training time, accuracy over time, tokens and FLOP by stage, and every number. With --data also what the checkpoints
have to be asked: accuracy at other keep ratios and fences, how alike neighbouring frames are, examples. That is kept in
DIR, so that a second call is quick."""

EPILOG = """\
examples:
  sparsify report runs/demo
  sparsify report runs/demo --data data/demo                          and what the checkpoint says when asked
  sparsify report runs/demo --data data/demo --clips 100              the same, from fewer clips: sooner
  sparsify report runs/dense-* runs/sparse-* --output reports/seeds   seeds of one configuration are one group
  sparsify report runs/a runs/b --label runs/a=before --label runs/b=after"""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="charts and tables of runs, side by side, as one page",
        usage="sparsify report RUN... [--output DIR] [--data ROOT] [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folders of `sparsify train`")
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path("report"), help="folder of the page")
    parser.add_argument("--data", metavar="ROOT", type=Path, help="data folder that judged the runs")
    for name in ("train", "val", "test"):
        parser.add_argument(
            f"--{name}", metavar="FILE", type=Path, help=f"instead of ROOT/annotations/avqa-{name}.json"
        )
    parser.add_argument("--cache", metavar="DIR", type=Path, help="decoded clips (default: ROOT/cache)")
    parser.add_argument(
        "--clips",
        metavar="N",
        type=count,
        help="ask about N clips, spread over the judged split (default: all); a run is asked eleven times",
    )
    parser.add_argument(
        "--label",
        metavar="RUN=NAME",
        action="append",
        default=[],
        help="call this run so; runs with the same name are seeds of one setting",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.clips == 0:
        raise UsageError("--clips 0: expected at least one clip; without --data no checkpoint is asked")
    files = {"train": args.train, "val": args.val, "test": args.test}
    if args.data is None and (named := [name for name, file in files.items() if file is not None]):
        raise UsageError(f"--{named[0]}: expected --data ROOT with it; without it no checkpoint is asked")
    from sparsify.data.music_avqa import DataRoot

    root = None if args.data is None else DataRoot(args.data, **files)
    names = _labels(args.label, args.runs)
    from sparsify.report.runs import group_runs, load_run

    if len({folder.resolve() for folder in args.runs}) < len(args.runs):
        raise UsageError("report: expected every RUN once")
    groups = group_runs([load_run(folder, names.get(folder)) for folder in args.runs])
    if args.output.exists() and not args.output.is_dir():
        raise UsageError(f"--output {args.output}: is a file; expected a folder")
    args.output.mkdir(parents=True, exist_ok=True)
    from sparsify.report.build import build

    page = build(groups, args.output, root, cache=args.cache, clips=args.clips, quiet=not sys.stderr.isatty())
    print(page)
    return 0


def _labels(options: list[str], runs: list[Path]) -> dict[Path, str]:
    names: dict[Path, str] = {}
    for option in options:
        folder, equals, name = option.rpartition("=")
        if not equals or not name.strip():
            raise UsageError(f"--label: expected RUN=NAME, got {option!r}")
        if Path(folder) not in runs:
            raise UsageError(f"--label {option}: {folder} is not among the runs")
        names[Path(folder)] = name.strip()
    return names
