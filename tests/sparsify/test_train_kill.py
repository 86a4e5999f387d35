"""A run killed with SIGKILL at any moment and resumed is, bit for bit, the run that was left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify.config import Config

SCRIPT = Path(__file__).with_name("kill_and_resume.py")


@pytest.mark.parametrize("kills", [5, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_runs_go_on_as_if_nothing_had_happened(
    kills: int, tiny_config: Config, tiny_files: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_config.to_dict()))
    arguments = ["--root", str(tiny_files), "--config", str(config), "--kills", str(kills), "--seed", str(kills)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60 + 60 * kills,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills, all the same" in done.stdout
