"""``--help`` as stored in ``snapshots/``, ``--version``, and how fast both answer.

After a wanted change: ``SPARSIFY_UPDATE_SNAPSHOTS=1 pytest tests/sparsify/test_cli_help.py``, and read the difference.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparsify
from sparsify.cli import main

SNAPSHOTS = Path(__file__).parent / "snapshots"
COMMANDS = {
    "sparsify": [],
    "synth": ["synth"],
    "data-check": ["data", "check"],
    "train": ["train"],
    "eval": ["eval"],
    "ask": ["ask"],
    "select": ["select"],
    "report": ["report"],
    "info": ["info"],
}
HEAVY = {"torch", "numpy", "rich", "av", "timm", "transformers", "matplotlib", "accelerate", "triton"}


def _help(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "102")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_the_stored_text(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = _help(COMMANDS[name], capsys, monkeypatch)
    stored = SNAPSHOTS / f"help-{name}.txt"
    if os.environ.get("SPARSIFY_UPDATE_SNAPSHOTS") == "1":
        stored.write_text(text, encoding="utf-8")
    assert text == stored.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_its_width_and_has_examples(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = _help(COMMANDS[name], capsys, monkeypatch)
    assert max(map(len, text.splitlines())) <= 110
    assert text.count("  sparsify ") >= 2


def test_every_command_is_in_the_main_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = _help([], capsys, monkeypatch)
    for command in ("synth", "data check", "train", "eval", "ask", "select", "info"):
        assert command in text
    for code in ("0  done", "2  usage", "3  data", "4  media", "5  checkpoint", "130  interrupted"):
        assert code in text


def test_every_option_with_a_default_shows_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " ".join(_help(["synth"], capsys, monkeypatch).split())
    for shown in (
        "training clips (default: 2000)",
        "3 to 600 (default: 4.0)",
        "1 to 60 (default: 8)",
        "is drawn (default: 0)",
    ):
        assert shown in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"sparsify {sparsify.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["ask", "--help"], ["train", "nowhere", "--preset", "grand"]])
def test_no_heavy_package_is_imported_to_say_so(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom sparsify.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "print('\\n' + ' '.join(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.splitlines()[-1].split())


def test_python_dash_m_answers() -> None:
    """How fast, ``benchmarks/test_start_up.py`` measures."""
    done = subprocess.run([sys.executable, "-m", "sparsify", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: sparsify COMMAND")
