"""The ``sparsify`` argument parser: what all commands share, and the list of commands."""

from __future__ import annotations

import argparse
import shutil
from typing import Any, NoReturn

import sparsify
from sparsify.errors import UsageError

__all__ = ["Parser", "build_parser", "count", "positive", "seed", "share"]

DESCRIPTION = """\
Learns to answer questions about music videos without computing half of the video: in training half of the frames and
of the spectrogram is masked and never read, and what remains is merged into a quarter of the tokens."""

EPILOG = """\
from nothing to an answer:
  sparsify synth data/demo                        render a data set (or use MUSIC-AVQA's files)
  sparsify data check data/demo                   count questions, find broken videos and leaks
  sparsify train data/demo --output runs/demo     a CPU, minutes
  sparsify eval runs/demo data/demo               accuracy per question type, beside its floor
  sparsify ask runs/demo clip.mp4 "How many instruments are sounding in the video?"

a data folder (ROOT) is laid out as MUSIC-AVQA's:
  ROOT/annotations/avqa-train.json, avqa-val.json, avqa-test.json
  ROOT/videos/<video_id>.mp4

exit codes:
  0  done
  1  another error
  2  usage or configuration: an unknown option, preset or key, an empty question, a run folder in use
  3  data: annotations missing or malformed; for `data check`: something is wrong
  4  media: a video that cannot be read
  5  checkpoint: RUN is incomplete, of another version, or no checkpoint
  130  interrupted (a training run saves itself first)

environment:
  SPARSIFY_DEBUG=1             show the traceback of an error
  SPARSIFY_BACKEND=reference   plain PyTorch instead of the fast kernels
  NO_COLOR=1                   no colours"""


class _Formatter(argparse.HelpFormatter):
    """Fills running text, keeps paragraphs with indented lines as they are, and adds defaults to options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=min(shutil.get_terminal_size().columns - 2, 100))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(p if "\n  " in p else fill(p, width, indent) for p in text.split("\n\n"))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # A plain zero is a default to show; it equals False, hence `is`.
        shown = action.option_strings and not any(action.default is x for x in (None, False, argparse.SUPPRESS))
        return f"{action.help} (default: %(default)s)" if shown and action.help else action.help


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ``UsageError``: one line and an exit code, as every other error."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def positive(text: str) -> float:
    """An argument type: a number above zero."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def count(text: str) -> int:
    """An argument type: a whole number, zero included."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """An argument type: a share in [0, 1)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a share of at least 0 and below 1, got {text!r}")
    return value


def seed(text: str) -> int:
    """An argument type: a seed in [0, 2^63)."""
    value = count(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a seed below 2^63, got {text!r}")
    return value


def build_parser() -> Parser:
    """The parser of the whole command line; the parsed arguments carry ``run``, the command's function."""
    from sparsify.cli import ask, check, evaluate, info, report, select, synth, train

    parser = Parser(
        prog="sparsify",
        usage="sparsify COMMAND ... (`sparsify COMMAND --help` explains a command)",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"sparsify {sparsify.__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True, prog="sparsify"
    )
    for command in (synth, check, train, evaluate, ask, select, report, info):
        command.add(commands)
    return parser
