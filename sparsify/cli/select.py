"""``sparsify select``: the part of a run's training split that is worth training on again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sparsify.cli._parser import seed
from sparsify.cli._write import check_writable, write_json
from sparsify.errors import CheckpointError, UsageError

__all__ = ["add", "run"]

UNITS = ("question", "video")
SELECTORS = ("paper", "random", "robust", "stratified")

DESCRIPTION = """\
Chooses the key subset of a run: the samples that its epochs kept coming back to. Writes two files: the ids of the
questions, with the fingerprint of the split they are of, and the same questions in MUSIC-AVQA's own form.
`sparsify train --subset FILE` takes either."""

EPILOG = """\
examples:
  sparsify train data/demo --skip 0.5 --output runs/all
  sparsify select runs/all --size 25% --unit video --output quarter.json
  sparsify train data/demo --subset quarter.json --output runs/quarter
  sparsify select runs/all --size 25% --unit video --selector random --seed 1       the control

selectors:
  paper       the most kept, earlier epochs counting more (Diao et al., ACL 2025)
  random      every sample alike: what a subset has to beat; in docs/results.md none did
  robust      paper, without the tenth with the highest losses; what is asked already counts less
  stratified  paper within each question type and template, which keep their shares"""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "select",
        help="choose the questions or videos of a run that are worth training on again",
        usage="sparsify select RUN --size N [--unit video] [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument(
        "run_folder", metavar="RUN", type=Path, help="a run folder of `sparsify train`, trained with --skip"
    )
    parser.add_argument(
        "--size", metavar="N", type=_size, required=True, help="how many questions, or videos; or a share, as 25%%"
    )
    parser.add_argument("--unit", metavar="UNIT", default="question", help="what is chosen: question or video")
    parser.add_argument("--selector", metavar="NAME", default="paper", help=", ".join(SELECTORS))
    parser.add_argument("--seed", metavar="SEED", type=seed, default=0, help="of the selector random")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="the ids (default: RUN/subset-<selector>-<unit>-<N>.json)"
    )
    parser.add_argument(
        "--train", metavar="FILE", type=Path, help="the run's annotation file, if it is no longer where it was"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for option, value, known in (("--unit", args.unit, UNITS), ("--selector", args.selector, SELECTORS)):
        if value not in known:
            raise UsageError(f"{option}: expected {', '.join(known[:-1])} or {known[-1]}, got {value!r}")
    if not (args.run_folder / "last").is_dir():
        raise CheckpointError(f"RUN {args.run_folder}: expected a run folder of `sparsify train`, with last/ in it")
    check_writable(args.output, "--output", (".json",))
    from sparsify.data.subset import subset_document, to_row
    from sparsify.training import selectors

    records = selectors.read_records(args.run_folder, args.unit, args.train)
    if not records.skipping and args.selector != "random":
        raise UsageError(
            f"--selector {args.selector}: {args.run_folder} skipped nothing, so all of its samples rank alike; "
            "train it with --skip 0.5, or choose --selector random"
        )
    size = _count(args.size, len(records.samples), args.unit)
    output = args.output or args.run_folder / f"subset-{args.selector}-{args.unit}-{size}.json"
    chosen = selectors.SELECTORS[args.selector](records.samples, size, args.seed)
    questions = [question for sample in chosen for question in sample.questions]
    notes = {
        "run": str(args.run_folder),
        "selector": args.selector,
        "unit": args.unit,
        "size": size,
        "epochs": records.epochs,
        "seed": args.seed,
    }
    write_json(output, subset_document([q.id for q in questions], records.fingerprint, notes), "--output")
    annotations = output.with_name(f"{output.stem}-avqa.json")
    write_json(annotations, [to_row(question) for question in questions], "--output")
    videos = len({question.video_id for question in questions})
    print(
        f"{len(questions):,} questions about {videos:,} videos, chosen by {records.epochs} epochs of {args.run_folder}"
    )
    print(f"ids: {output}\nin MUSIC-AVQA's own form: {annotations}")
    return 0


def _size(text: str) -> str:
    """An argument type: a whole number above zero, or a percentage of up to 100 %."""
    number = text.removesuffix("%")
    try:
        value = float(number) if number != text else int(number)
    except ValueError:
        value = 0
    if not value > 0 or (number != text and value > 100):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, or a share such as 25%, got {text!r}")
    return text


def _count(size: str, candidates: int, unit: str) -> int:
    if size.endswith("%"):
        return max(1, round(float(size[:-1]) / 100 * candidates))
    if int(size) > candidates:
        raise UsageError(f"--size {size}: the run has {candidates} {unit}s to choose from")
    return int(size)
