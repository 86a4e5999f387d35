"""The registry tells the truth: no rung is missing that is not listed, none is listed that exists."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import pytest
import torch

import sparsify_kernels
from sparsify_kernels import _registry
from sparsify_kernels._registry import RUNGS, TO_COME, missing

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("op", TO_COME)
def test_the_rungs_to_come_are_the_missing_ones(op: str) -> None:
    assert missing(op, ROOT) == set(TO_COME[op])


def test_no_rung_is_to_come() -> None:
    assert not any(TO_COME.values())


def test_every_public_op_is_in_the_registry() -> None:
    functions = {name for name in sparsify_kernels.__all__ if inspect.isfunction(getattr(sparsify_kernels, name))}
    helpers = {"backend_info", "gather_tokens"}
    assert functions - helpers == {op for op in TO_COME if TO_COME[op] != RUNGS}


@pytest.mark.parametrize(
    ("rung", "path"),
    [
        ("cpp", "csrc/random_mask.cpp"),
        ("test", "tests/sparsify_kernels/random_mask"),
        ("benchmark", "benchmarks/test_random_mask.py"),
        ("docs", "docs/ops.md"),
    ],
)
def test_a_rung_taken_away_is_noticed(rung: str, path: str, tmp_path: Path) -> None:
    for folder in ("csrc", "tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    assert rung not in missing("random_mask", tmp_path)
    target = tmp_path / path
    if target.is_dir():
        shutil.rmtree(target)
    elif rung == "docs":
        target.write_text(target.read_text().replace("random_mask", "something_else"))
    else:
        target.unlink()
    assert missing("random_mask", tmp_path) == {rung}


@pytest.mark.parametrize("op", [op for op in TO_COME if TO_COME[op] != RUNGS])
def test_schemas_are_defined_in_python(op: str) -> None:
    """So the ops exist without the extension; every kernel has a fake and is functional."""
    kernels = _registry.kernels_of(op)
    assert op in kernels
    for kernel in kernels:
        schema = getattr(torch.ops.sparsify_kernels, kernel).default._schema
        assert not schema.is_mutable
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsify_kernels::{kernel}", "Meta")


def test_a_kernel_belongs_to_the_op_its_name_begins_with() -> None:
    assert _registry.op_of("merge_tokens_backward") == "merge_tokens"
    with pytest.raises(ValueError):
        _registry.op_of("unknown_op")
