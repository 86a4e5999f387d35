"""``sparsify train``: train a model on a data folder."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from sparsify.cli._parser import count, seed, share
from sparsify.config import PRESETS, Config
from sparsify.errors import UsageError

__all__ = ["add", "run"]

DESCRIPTION = """\
Trains a model on ROOT's training split, picks the best epoch by validation and judges it on the test split, if there is
one. Everything goes into one run folder: config.json, metrics.jsonl, tensorboard/, best/, last/, results.json and
predictions.json, the best epoch's answers. Ctrl-C saves and ends; --resume goes on as if nothing had happened, after a
crash or a kill, too."""

EPILOG = """\
examples:
  sparsify train data/demo --output runs/demo                 a CPU, minutes
  sparsify train data/music_avqa --preset paper --output runs/paper \\
      --vision-weights swinv2_tiny_window8_256.ms_in1k --audio-weights laion/clap-htsat-unfused
  sparsify train data/demo --dense --output runs/dense        the baseline: nothing masked, merged or skipped
  sparsify train data/demo --skip 0.5 --output runs/skip      easy videos are not encoded in every epoch
  sparsify train data/demo --deaf --output runs/deaf          a control: what is the sound worth?
  sparsify train data/demo --set train.lr=3e-4 --set mask.epochs=[0,6]
  sparsify train data/demo --resume --output runs/demo        go on with a stopped run

presets: demo (a CPU in minutes), paper (Diao et al., ACL 2025), adaptive (paper, with Tukey's fence for key tokens).
`sparsify info --preset NAME` prints every key that --set can change."""

# Shortcuts: option name -> config key.
_SHORTCUTS = {
    "epochs": "train.epochs",
    "seed": "train.seed",
    "workers": "train.workers",
    "skip": "select.skip",
    "subset": "select.subset",
    "vision_weights": "vision.weights",
    "audio_weights": "audio.weights",
    "text_weights": "text.weights",
}


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model on a data folder; the best epoch on validation is kept",
        usage="sparsify train ROOT [--output RUN] [--preset NAME] [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("root", metavar="ROOT", type=Path, help="data folder, with annotations/ and videos/ in it")
    parser.add_argument("--output", metavar="RUN", type=Path, help="run folder (default: runs/<preset>-<date>-<time>)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output, configured as it was")
    config = parser.add_argument_group("configuration")
    config.add_argument("--preset", metavar="NAME", help=f"{', '.join(PRESETS)} (default: demo)")
    config.add_argument("--set", metavar="KEY=VALUE", action="append", help="change any key; may be repeated")
    config.add_argument("--epochs", metavar="N", type=count, help="passes over the training split")
    config.add_argument("--seed", metavar="SEED", type=seed, help="decides weights, data order, masks and dropout")
    config.add_argument(
        "--workers", metavar="N", type=count, help="data loading processes; 0 loads in the main process"
    )
    config.add_argument(
        "--skip",
        metavar="SHARE",
        type=share,
        help="an epoch skips this share of the videos that the model finds easy; 0.5 in the paper, there of the "
        "questions: --set select.unit=question",
    )
    config.add_argument("--dense", action="store_true", help="no masking, merging, skipping: the baseline")
    controls = config.add_mutually_exclusive_group()
    controls.add_argument("--blind", action="store_true", help="a control: no picture")
    controls.add_argument("--deaf", action="store_true", help="a control: no sound")
    controls.add_argument("--textonly", action="store_true", help="a control: neither")
    weights = parser.add_argument_group("pretrained weights (a name or a local path; random without)")
    weights.add_argument("--vision-weights", metavar="NAME", help="Swin-V2, as timm names it")
    weights.add_argument("--audio-weights", metavar="NAME", help="CLAP with an HTS-AT, as transformers names it")
    weights.add_argument(
        "--text-weights", metavar="NAME", help="a Hugging Face text encoder in place of the word model"
    )
    data = parser.add_argument_group("data")
    data.add_argument("--cache", metavar="DIR", type=Path, help="decoded clips (default: ROOT/cache)")
    data.add_argument(
        "--subset", metavar="FILE", type=_existing, help="train on these questions only: what `sparsify select` wrote"
    )
    data.add_argument(
        "--filter-leaks", action="store_true", help="leave out questions of --subset that the run is judged by"
    )
    for name in ("train", "val", "test"):
        data.add_argument(f"--{name}", metavar="FILE", type=Path, help=f"instead of ROOT/annotations/avqa-{name}.json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.resume and args.output is None:
        raise UsageError("--resume: expected --output RUN, the run to go on with")
    config = _config(args)  # before torch is imported: a wrong key answers at once
    output = args.output or Path("runs") / f"{args.preset or 'demo'}-{time.strftime('%Y%m%d-%H%M%S')}"
    from sparsify.data.music_avqa import DataRoot

    root = DataRoot(args.root, train=args.train, val=args.val, test=args.test)
    from sparsify.training import train

    results = train(config, root, output, resume=args.resume, cache_folder=args.cache)
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes the first speaks
        print(_summary(results, output))
    return 0


def _config(args: argparse.Namespace) -> Config | None:
    """The configuration asked for; None for a resumed run that is to go on as it was."""
    options = (args.set or []) + [
        f"{key}={json.dumps(getattr(args, name))}"
        for name, key in _SHORTCUTS.items()
        if getattr(args, name) is not None
    ]
    if args.filter_leaks:
        options.append("select.filter_leaks=true")
    if args.dense:
        options.append("dense=true")
    options += [f"train.inputs={name}" for name in ("blind", "deaf", "textonly") if getattr(args, name)]
    if not args.resume or args.preset is not None:
        return Config.preset(args.preset or "demo").with_options(options)
    if not options:
        return None
    return _saved_config(args.output).with_options(options)


def _existing(text: str) -> str:
    """An argument type: a file, by its absolute path, so that a resumed run finds it from anywhere."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"expected a file, found {'a folder' if Path(text).is_dir() else 'nothing'}")
    return str(Path(text).resolve())


def _saved_config(run_folder: Path) -> Config:
    path = run_folder / "config.json"
    try:
        return Config.from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError:
        raise UsageError(f"{run_folder} holds no run to resume: it has no config.json") from None
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error})") from None


def _summary(results: dict[str, Any], output: Path) -> str:
    found = results["evaluation"]["unmasked"]
    floor = found["scores"]["overall"]["floor"]
    beside = "" if floor is None else f", floor {floor:.2%}"
    return f"{results['judged']} accuracy {found['accuracy']:.2%}{beside}; the model is in {output / 'best'}"
