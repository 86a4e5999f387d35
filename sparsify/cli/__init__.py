"""The command line. ``main`` is the console script ``sparsify``; every command is a module of this package.

A command module offers ``add(commands)``, which describes the command to argparse, and ``run(args)``, which carries it
out. Heavy packages are imported inside ``run``, so that ``--help`` and usage errors answer at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

from sparsify.cli._parser import build_parser
from sparsify.errors import SparsifyError

__all__ = ["main"]

INTERRUPTED = 130  # what shells report for a command ended by Ctrl-C
BROKEN_PIPE = 141  # and for one whose reader went away
# Absent after a plain `pip install sparsify-avqa`, which is for users of the ops alone.
EXTRA = "accelerate av matplotlib PIL pretty_midi rich safetensors tensorboard timm torchvision transformers"
HOW_TO_INSTALL = dict.fromkeys(EXTRA.split(), "'sparsify-avqa[avqa]'") | {
    "numpy": "numpy",
    "tinysoundfont": "--no-deps tinysoundfont",  # it declares pyaudio, which few machines can build
    "torch": "torch",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors are one line on stderr; ``SPARSIFY_DEBUG=1`` shows tracebacks."""
    plain, warnings.formatwarning = warnings.formatwarning, _format_warning
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
        _say(str(interrupt) or "interrupted")
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("SPARSIFY_DEBUG") == "1":
            raise
        _say(f"error: {_message(error)}")
        return error.exit_code if isinstance(error, SparsifyError) else 1
    finally:
        warnings.formatwarning = plain


def _say(text: str) -> None:
    """One line on stderr, whatever the text holds."""
    print(f"sparsify: {' '.join(text.split())}", file=sys.stderr)


def _format_warning(message: Warning | str, *_: object, **__: object) -> str:
    return f"sparsify: warning: {message}\n"


def _message(error: Exception) -> str:
    """What a user is told of ``error``; what is not a SparsifyError is told as plainly as it can be."""
    if isinstance(error, SparsifyError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if package in HOW_TO_INSTALL:
            return f"this command needs the package {package}; install it with: pip install {HOW_TO_INSTALL[package]}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {error} (unexpected; SPARSIFY_DEBUG=1 shows where)"
