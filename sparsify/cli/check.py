"""``sparsify data check``: what a data folder holds, what is broken in it, and what leaks between its splits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sparsify.cli._parser import count
from sparsify.cli._write import check_writable, write_json
from sparsify.errors import DataError

__all__ = ["add", "run"]

DESCRIPTION = """\
Checks a data folder: counts questions per type and split, and finds malformed rows, missing, broken and silent videos,
duplicates, and questions that stand in two splits (a leak). Changes nothing."""

EPILOG = """\
examples:
  sparsify data check data/music_avqa                  annotations and videos
  sparsify data check data/music_avqa --no-media       annotations alone: seconds
  sparsify data check data/music_avqa --json check.json

exits with 0 if nothing is wrong, with 3 if something is; missing and silent videos are counted, not wrong"""


def add(commands: Any) -> None:
    data = commands.add_parser(
        "data",
        help="`data check`: count questions, find broken videos and leaks between splits",
        usage="sparsify data check ROOT [options]",
        description="Looks after a data folder.",
    )
    actions = data.add_subparsers(
        title="commands", metavar="COMMAND", dest="action", required=True, prog="sparsify data"
    )
    parser = actions.add_parser(
        "check",
        help="count questions, find broken videos and leaks between splits",
        usage="sparsify data check ROOT [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("root", metavar="ROOT", type=Path, help="data folder, with annotations/ and videos/ in it")
    parser.add_argument(
        "--no-media", action="store_true", help="do not open the videos, only see whether they are there"
    )
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="write everything found to FILE, the whole lists included"
    )
    parser.add_argument(
        "--workers", metavar="N", type=count, help="videos read at a time (default: one a core, at most 8)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from sparsify.cli._progress import counting_bar
    from sparsify.data.check import check_root

    check_writable(args.json, "--json")
    with counting_bar("check") as progress:
        report = check_root(args.root, media=not args.no_media, progress=progress, workers=args.workers or None)
    if args.json is not None:
        write_json(args.json, report.to_dict(), "--json")
    print(report.text())
    return 0 if report.ok else DataError.exit_code
