"""``sparsify eval``: every question of a split, scored beside its floor."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sparsify.cli._parser import count, seed
from sparsify.cli._run import RUN_HELP, checkpoint_folder, load_model, open_cache
from sparsify.cli._write import check_writable, write_json
from sparsify.errors import UsageError

__all__ = ["add", "run"]

DESCRIPTION = """\
Answers every question of a split and prints the accuracy of the nine types, of audio, visual and audio-visual questions
and overall, beside the floor: the larger of the majority answer per template and per filled question, learnt on ROOT's
training file. Videos that cannot be read are skipped and counted."""

EPILOG = """\
examples:
  sparsify eval runs/demo data/demo
  sparsify eval runs/demo data/demo --masked                     half of the input hidden
  sparsify eval runs/paper data/v2 --test data/v2/balanced.json --predictions out.csv --json scores.json

--predictions writes id, type, answer, probability and whether it is right, one question a row (.json or .csv)"""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="score a model on a split: nine question types, each beside its floor",
        usage="sparsify eval RUN ROOT [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, help=RUN_HELP)
    parser.add_argument("root", metavar="ROOT", type=Path, help="data folder, with annotations/ and videos/ in it")
    parser.add_argument("--split", metavar="NAME", default="test", help="train, val or test")
    parser.add_argument("--masked", action="store_true", help="hide a part of the input, as in training")
    parser.add_argument("--seed", metavar="SEED", type=seed, help="which part --masked hides (default: the run's seed)")
    results = parser.add_argument_group("results")
    results.add_argument("--predictions", metavar="FILE", type=Path, help="write every answer to FILE (.json or .csv)")
    results.add_argument("--json", metavar="FILE", type=Path, help="write the scores to FILE")
    results.add_argument(
        "--localisation",
        action="store_true",
        help="on a rendered data set, which knows where its players are: do the merge scores rank those that sound "
        "above the background?",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--cache", metavar="DIR", type=Path, help="decoded clips (default: ROOT/cache)")
    data.add_argument(
        "--workers", metavar="N", type=count, default=0, help="data loading processes; 0 loads in this one"
    )
    data.add_argument(
        "--videos", metavar="N", type=count, default=32, help="videos at a time; the answers do not depend on it"
    )
    for name in ("train", "val", "test"):
        data.add_argument(f"--{name}", metavar="FILE", type=Path, help=f"instead of ROOT/annotations/avqa-{name}.json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from sparsify.data.music_avqa import SPLITS, DataRoot

    if args.split not in SPLITS:
        raise UsageError(f"--split: expected {', '.join(SPLITS)}, got {args.split!r}")
    if not args.videos:
        raise UsageError("--videos: expected at least 1, got 0")
    check_writable(args.predictions, "--predictions", (".json", ".csv"))
    check_writable(args.json, "--json")
    checkpoint_folder(args.run_folder)
    root = DataRoot(args.root, train=args.train, val=args.val, test=args.test)
    split = root.split(args.split)
    from sparsify.report.localisation import read_scenes

    scenes = read_scenes(root.root, args.split) if args.localisation else None
    from sparsify.progress import progress_bar
    from sparsify.training.evaluate import evaluate, write_predictions

    model = load_model(args.run_folder)
    if args.masked and model.config.dense:
        raise UsageError(f"--masked: {args.run_folder} is a dense model, which is never masked")
    cache = open_cache(args.cache or root.root / "cache", model.config)
    with progress_bar(f"eval {args.split}", len(split.videos)) as advance:
        result = evaluate(
            model,
            root,
            split,
            cache=cache,
            batch_size=args.videos,
            masked=args.masked,
            inputs=model.config.train.inputs,
            seed=args.seed,
            precision=model.config.train.precision,
            workers=args.workers,
            advance=advance,
        )
    if args.predictions is not None:
        write_predictions(args.predictions, result.predictions)
    if args.json is not None:
        write_json(args.json, result.to_dict(), "--json")
    _print(result, split)
    if scenes is not None:
        print(f"\n{_localise(model, root, split, cache, result, scenes).text()}")
    return 0


def _localise(model: Any, root: Any, split: Any, cache: Any, result: Any, scenes: dict[str, Any]) -> Any:
    from sparsify.data.dataset import VideoDataset
    from sparsify.report.localisation import localisation

    dataset = VideoDataset(root, split, model.config, model.vocabulary, cache, result.inputs, result.skipped)
    return localisation(model, dataset, scenes)


def _print(result: Any, split: Any) -> None:
    print(split.describe())
    seen = "everything" if result.keep == 1 else f"{result.keep:.0%} of the input"
    lacking = {"both": "", "blind": ", no picture", "deaf": ", no sound", "textonly": ", neither picture nor sound"}
    print(f"the model saw {seen}{lacking[result.inputs]}\n")
    print(result.scores.table())
    if result.skipped:
        print(f"\n{result.counts()}")
    for video, reason in list(result.skipped.items())[:5]:
        print(f"  skipped {video}: {reason}")
    if len(result.skipped) > 5:
        print(f"  ... and {len(result.skipped) - 5} more")
