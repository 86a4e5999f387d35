"""``sparsify synth``: render a data set of music performances in MUSIC-AVQA's format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sparsify.cli._parser import count, positive, seed
from sparsify.errors import UsageError

__all__ = ["add", "run"]

DESCRIPTION = """\
Renders a data set in MUSIC-AVQA's own format: real mp4 files of one to five players, their sound from a General MIDI
sound font, and questions from the data set's 33 templates with answers that are true by construction. The same seed
gives the same data set."""

EPILOG = """\
examples:
  sparsify synth data/demo                                    2,000 + 200 + 400 clips of 4 s
  sparsify synth data/tiny --train 16 --val 4 --test 4        for a first look: seconds
  sparsify synth data/real --standins data/real/annotations/avqa-val.json --videos 200
                                                              stand-in clips for videos you do not have"""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "synth",
        help="render a data set: real mp4 files with players, sound, questions and answers",
        usage="sparsify synth ROOT [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("root", metavar="ROOT", type=Path, help="folder to fill; made if it does not exist")
    size = parser.add_argument_group("size")
    size.add_argument("--train", metavar="CLIPS", type=count, default=2000, help="training clips")
    size.add_argument("--val", metavar="CLIPS", type=count, default=200, help="validation clips")
    size.add_argument("--test", metavar="CLIPS", type=count, default=400, help="test clips")
    clip = parser.add_argument_group("clips")
    clip.add_argument("--seconds", metavar="SECONDS", type=positive, default=4.0, help="length of a clip: 3 to 600")
    clip.add_argument("--size", metavar="PIXELS", type=count, default=128, help="width and height: even, 32 to 2048")
    clip.add_argument("--fps", metavar="FPS", type=count, default=8, help="frames per second: 1 to 60")
    clip.add_argument(
        "--questions",
        metavar=("LEAST", "MOST"),
        nargs=2,
        type=count,
        help="questions about a training clip, as many as its scene answers (default: 3 4)",
    )
    clip.add_argument(
        "--eval-questions",
        metavar=("LEAST", "MOST"),
        nargs=2,
        type=count,
        help="the same of validation and test clips (default: 3 4)",
    )
    clip.add_argument("--seed", metavar="SEED", type=seed, default=0, help="decides everything that is drawn")
    parser.add_argument("--workers", metavar="N", type=count, help="rendering processes (default: one a core)")
    standins = parser.add_argument_group("stand-ins for a real data set")
    standins.add_argument(
        "--standins",
        metavar="FILE",
        type=Path,
        help="instead of a data set of its own: clips for the videos that this annotation file asks about",
    )
    standins.add_argument("--videos", metavar="N", type=count, help="stand in for the first N of them (default: 200)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.videos is not None and args.standins is None:
        raise UsageError("--videos is for --standins FILE; for a data set of its own give --train, --val and --test")
    if (args.questions or args.eval_questions) and args.standins is not None:
        option = "--questions" if args.questions else "--eval-questions"
        raise UsageError(f"{option} is for a data set of its own; stand-ins are asked what FILE asks")
    from sparsify import synth
    from sparsify.cli._progress import counting_bar

    look = {name: getattr(args, name) for name in ("seed", "seconds", "size", "fps")}
    with counting_bar("render") as progress:
        options = look | {"workers": args.workers or None, "progress": progress}
        if args.standins is not None:
            ids = synth.write_standins(
                args.root, args.standins, videos=200 if args.videos is None else args.videos, **options
            )
        else:
            options["questions"] = tuple(args.questions or (3, 4))
            options["eval_questions"] = tuple(args.eval_questions or (3, 4))
            synth.write(args.root, train=args.train, val=args.val, test=args.test, **options)
    if args.standins is not None:
        print(f"stand-in clips in {args.root / 'videos'} for the first {len(ids):,} videos of {args.standins}")
    else:
        clips = args.train + args.val + args.test
        print(f"{clips:,} clips in {args.root}; train with: sparsify train {args.root} --output runs/demo")
    return 0
