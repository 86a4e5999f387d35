"""The command line. ``main`` is the console script ``sparsify``; every command is a module of this package.

A command module offers ``add(commands)``, which describes the command to argparse, and ``run(args)``, which carries it
out. Heavy packages are imported inside ``run``, so that ``--help`` and usage errors answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from sparsify.cli._parser import build_parser
from sparsify.errors import SparsifyError

__all__ = ["main"]

INTERRUPTED = 130  # what shells report for a command ended by Ctrl-C
BROKEN_PIPE = 141  # and for one whose reader went away
# Packages of the [avqa] extra: absent after a plain `pip install sparsify-avqa`, which is for users of the ops alone.
EXTRA = {
    "accelerate",
    "av",
    "matplotlib",
    "PIL",
    "pretty_midi",
    "rich",
    "safetensors",
    "tensorboard",
    "timm",
    "torchvision",
    "transformers",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors are one line on stderr; ``SPARSIFY_DEBUG=1`` shows tracebacks."""
    try:
        try:
            args = build_parser().parse_args(argv)
            code = args.run(args)
        finally:
            sys.stdout.flush()  # here, where a reader that went away can still be told from other errors
        return int(code or 0)
    except BrokenPipeError:
        # The interpreter flushes stdout once more on its way out; give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt as interrupt:  # a training run that saved itself says where, and how to go on
        print(f"sparsify: {' '.join(str(interrupt).split()) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("SPARSIFY_DEBUG") == "1":
            raise
        print(f"sparsify: error: {_one_line(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, SparsifyError) else 1


def _one_line(error: Exception) -> str:
    """The message of ``error`` in one line; what is not a SparsifyError is told as plainly as it can be."""
    if isinstance(error, SparsifyError):
        text = str(error)
    elif isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] in EXTRA:
        text = f"this command needs the package {error.name!r}; install it with: pip install 'sparsify-avqa[avqa]'"
    elif isinstance(error, ModuleNotFoundError) and error.name == "tinysoundfont":
        text = "this command needs the package 'tinysoundfont'; install it with: pip install --no-deps tinysoundfont"
    elif isinstance(error, ModuleNotFoundError) and error.name == "torch":
        text = "this command needs PyTorch; install it with: pip install torch"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    else:
        text = f"{type(error).__name__}: {error} (unexpected; SPARSIFY_DEBUG=1 shows where)"
    return " ".join(text.split())
