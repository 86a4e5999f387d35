"""Every Triton kernel compiles for five GPUs without spilling a register or an atomic, and fits their shared memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify_kernels._registry import TO_COME

SCRIPT = Path(__file__).with_name("triton_targets.py")
WITH_TRITON = [op for op, to_come in TO_COME.items() if "triton" not in to_come]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: nothing was compiled")
@pytest.mark.parametrize("cases", [["--first"], pytest.param([], marks=pytest.mark.slow)], ids=["first", "all"])
@pytest.mark.parametrize("op", WITH_TRITON)
def test_kernels_compile_for_all_targets_without_spills(op: str, cases: list[str], tmp_path: Path) -> None:
    """The first case of each kernel, or all."""
    # Not under the interpreter; and into a fresh cache: what an earlier version left proves nothing.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, SCRIPT, op, *cases], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {case["gpu"] for case in found} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert [case for case in found if case["spilled"]] == []
    assert [case for case in found if case["shared"] > case["shared_limit"]] == []
    assert [case for case in found if case["atomics"]] == [], "the order of an atomic sum is anybody's"


@pytest.mark.parametrize("op", WITH_TRITON)
def test_every_kernel_of_the_file_is_among_the_targets(op: str) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed: nothing was compiled")
    module = importlib.import_module(f"sparsify_kernels.{op}.triton")
    compiled = {kernel.__name__ for kernel, *_ in module.TARGETS}
    source = Path(module.__file__ or "").read_text(encoding="utf-8")
    kernels = {n for n, value in vars(module).items() if isinstance(value, triton.runtime.jit.KernelInterface)}
    called_by_kernels = {name for name in kernels if f"{name}[" not in source}
    assert compiled == kernels - called_by_kernels
