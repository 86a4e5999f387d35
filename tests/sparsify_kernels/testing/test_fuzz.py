"""Random cases for the C++ kernels, and that the fuzzer finds what is wrong with a kernel."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsify_kernels import _registry
from sparsify_kernels.testing.fuzz import CASES, again, fuzz, parts

ROOT = Path(__file__).resolve().parents[3]
NEEDS_CPP = pytest.mark.skipif(not _registry.has_cpp("random_mask"), reason="the C++ extension is not built")


def test_every_op_is_fuzzed() -> None:
    assert set(CASES) == {op for op in _registry.TO_COME if _registry.kernels_of(op)}


IN_CPP = [op for op in CASES if "cpp" not in _registry.TO_COME[op]]


@NEEDS_CPP
@pytest.mark.parametrize("op", IN_CPP)
def test_a_few_cases(op: str) -> None:
    fuzz(op, 20)


@pytest.mark.slow
@NEEDS_CPP
@pytest.mark.parametrize("op", IN_CPP)
def test_cases(op: str) -> None:
    fuzz(op, 500)


def changed(kernel: str, change: Callable[[Any], Any]) -> Callable[[str], dict[str, Any]]:
    """``implementations`` in which the C++ ``kernel`` goes wrong by ``change``."""
    original = _registry.implementations

    def implementations(name: str) -> dict[str, Any]:
        found = original(name)
        right = found["cpp"]
        return found | {"cpp": lambda *args: change(right(*args))} if name == kernel else found

    return implementations


def off_by(step: float, part: int) -> Callable[[Any], Any]:
    def change(result: Any) -> Any:
        return tuple(t + step if i == part and t.numel() else t for i, t in enumerate(result))

    return change


WRONG = [
    ("random_mask", off_by(1, 1)),
    ("random_mask_backward", lambda t: t.clone().flip(1) if t.is_floating_point() else t),
    ("key_tokens", off_by(1, 1)),
    ("key_tokens_gather", lambda t: t * 0),
    ("key_tokens_gather_backward", lambda t: t * (1 + 1e-2)),
    ("attention_scores", off_by(1e-5, 0)),
    ("attention_scores", off_by(1e-2, 1)),
    ("attention_scores_backward", off_by(1e-2, 0)),
    ("attention_scores_backward", off_by(1e-3, 3)),
    ("merge_tokens", off_by(1e-2, 0)),
    ("merge_tokens", off_by(1, 2)),
    ("merge_tokens_backward", off_by(1e-2, 1)),
]


@pytest.mark.slow  # making a failing case simple takes seconds
@NEEDS_CPP
@pytest.mark.parametrize(("kernel", "change"), WRONG, ids=[f"{k}-{n}" for n, (k, _) in enumerate(WRONG)])
def test_a_wrong_kernel_is_found_and_its_case_runs_again(
    monkeypatch: pytest.MonkeyPatch, kernel: str, change: Callable[[Any], Any]
) -> None:
    right = _registry.implementations
    monkeypatch.setattr(parts._registry, "implementations", changed(kernel, change))
    with pytest.raises(AssertionError) as caught:
        fuzz(_registry.op_of(kernel), 100)
    (case,) = re.findall(r"--case '(.*)'$", str(caught.value))
    with pytest.raises(AssertionError):
        again(case)
    monkeypatch.setattr(parts._registry, "implementations", right)
    again(case)


@NEEDS_CPP
def test_command_line() -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sparsify_kernels.testing.fuzz", *options]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    done = run("--op", "random_mask", "--cases", "30", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("random_mask: 30 of 30 cases, ")
    done = run("--cases", "1")  # every op that C++ serves, and no other
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == IN_CPP
    done = run("--backend", "sycl")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("error: --backend sycl: serves no op here\n")
    case = CASES["random_mask"](1, 6, 2, 3, None, 1, "fp32", "contiguous", True, 0)
    done = run("--case", json.dumps({"op": "random_mask", **vars(case)}))
    assert (done.returncode, done.stdout) == (0, "passes\n"), done.stderr


def test_a_backend_that_is_not_there() -> None:
    with pytest.raises(LookupError, match="fuzz: key_tokens has no backend sycl here, only reference"):
        fuzz("key_tokens", 1, backend="sycl")
