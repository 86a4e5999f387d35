"""Progress on stderr: a bar with rate and time left on a terminal, a plain line now and then when piped."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol

__all__ = ["Advance", "format_seconds", "progress_bar", "say"]

LINE_SECONDS = 30.0  # between two plain lines of one bar


class Advance(Protocol):
    """Reports ``count`` more things done, with an optional ``note`` to show beside the bar."""

    def __call__(self, count: int = 1, note: str = "") -> None: ...


@contextlib.contextmanager
def progress_bar(description: str, total: int, *, quiet: bool = False) -> Iterator[Advance]:
    """``with progress_bar("decode", 200) as advance: ...; advance()``.

    A terminal shows a bar; a pipe or file gets a line every 30 seconds and one at the end; ``quiet`` shows nothing.
    Only one bar at a time.
    """
    if quiet:
        yield lambda count=1, note="": None
    elif sys.stderr.isatty():
        with _terminal_bar(description, total) as advance:
            yield advance
    else:
        with _plain_lines(description, total) as advance:
            yield advance


def say(text: str) -> None:
    """One message on stderr, at once."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def format_seconds(seconds: float) -> str:
    """``7.4`` is "7.4 s", ``190`` is "3:10", ``7384`` is "2:03:04"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextlib.contextmanager
def _terminal_bar(description: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.1f}/s")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total, note="")

        def advance(count: int = 1, note: str = "") -> None:
            if note:
                progress.update(task, advance=count, note=note)
            else:
                progress.update(task, advance=count)

        yield advance


@contextlib.contextmanager
def _plain_lines(description: str, total: int) -> Iterator[Advance]:
    started = printed = time.monotonic()
    done, last_note, shown = 0, "", -1

    def line() -> None:
        nonlocal shown
        shown = done
        seconds = time.monotonic() - started
        rate = f", {done / seconds:.1f}/s" if done and seconds > 0 else ""
        note = f", {last_note}" if last_note else ""
        say(f"{description}: {done}/{total} in {format_seconds(seconds)}{rate}{note}")

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, last_note, printed
        done, last_note = done + count, note or last_note
        if time.monotonic() - printed >= LINE_SECONDS:
            printed = time.monotonic()
            line()

    yield advance
    if shown != done:
        line()
