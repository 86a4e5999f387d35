"""Progress: plain lines in a pipe, nothing when quiet, a bar on a terminal."""

from __future__ import annotations

import io
import sys
import time

import pytest

from sparsify import progress
from sparsify.progress import format_seconds, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (7.44, "7.4 s"), (60, "1:00"), (190, "3:10"), (7384, "2:03:04")]
)
def test_seconds_read_like_a_clock(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_pipe_gets_one_line_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("decode", 3) as advance:
        advance()
        advance(2, "loss 1.5")
        assert capsys.readouterr().err == ""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("decode: 3/3 in ")
    assert captured.err.endswith("/s, loss 1.5\n")
    assert captured.err.count("\n") == 1


def test_a_pipe_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    with progress_bar("decode", 2) as advance:
        time.sleep(0.02)
        advance()
        assert capsys.readouterr().err.startswith("decode: 1/2 in ")
        time.sleep(0.02)
        advance()
    assert capsys.readouterr().err.count("decode: 2/2 in ") == 1  # the last line is not said twice


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("decode", 1, quiet=True) as advance:
        advance(1, "note")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_with_rate_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar("epoch 1/8", 10) as advance:
        advance(4)
        advance(6, "loss 2.25")
    shown = screen.getvalue()
    assert "epoch 1/8" in shown
    assert "10/10" in shown
    assert "/s" in shown
    assert "loss 2.25" in shown
