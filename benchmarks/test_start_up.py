"""How long the command line takes to answer: `sparsify --help` promises half a second, whatever else is installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest


def run(*arguments: str) -> Callable[[], Any]:
    return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


CASES = {
    "ours": run("-m", "sparsify", "--help"),
    "python, doing nothing": run("-c", ""),
    "python, importing torch": run("-c", "import torch"),
}


@pytest.mark.parametrize("name", list(CASES))
def test_help(benchmark: Any, table: Any, name: str) -> None:
    table.measure(benchmark, "sparsify --help", name, CASES[name], moved=0, rounds=5)
