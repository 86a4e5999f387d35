"""A run killed with SIGKILL at any moment and resumed is, bit for bit, the run that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify.config import Config

SCRIPT = Path(__file__).with_name("kill_and_resume.py")


@pytest.mark.parametrize(
    ("kills", "processes", "threads"),
    [
        (5, 1, 1),
        pytest.param(25, 1, 1, marks=pytest.mark.slow),
        pytest.param(5, 1, 2, marks=pytest.mark.slow),
        (1, 2, 1),
        pytest.param(10, 2, 1, marks=pytest.mark.slow),
    ],
)
def test_killed_runs_go_on_as_if_nothing_had_happened(
    kills: int, processes: int, threads: int, tiny_config: Config, tiny_files: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_config.to_dict()))
    arguments = ["--root", str(tiny_files), "--config", str(config), "--kills", str(kills), "--seed", str(kills)]
    arguments += ["--processes", str(processes), "--threads", str(threads)]
    script = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = script.communicate(timeout=300 + 60 * kills * processes)
    except subprocess.TimeoutExpired:
        os.killpg(script.pid, signal.SIGKILL)  # its runs, too
        raise
    assert script.returncode == 0, said
    assert f"{kills} kills, all the same" in said
