"""Ctrl-C and SIGTERM ask a run to stop: it finishes its step, saves, and ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["InterruptedRun", "StopRequest"]


class InterruptedRun(KeyboardInterrupt):
    """The run was asked to stop and has saved itself; the message says where, and how to go on."""


class StopRequest:
    """Whether a signal has asked to stop."""

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM sets ``requested``, a second one acts as without us. Main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in signals}

        def ask(number: int, frame: FrameType | None) -> None:
            self.requested = True
            restore()

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        for number in signals:
            signal.signal(number, ask)
        try:
            yield
        finally:
            restore()
