"""Which backend serves what, in processes of their own: as built, forced to the reference, without and with a stale
binary."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sparsify_kernels
from sparsify_kernels import _backends, _registry, backend_info
from sparsify_kernels._build import csrc_folder, source_hash

ROOT = Path(__file__).resolve().parents[2]
BUILT = _registry.has_cpp("random_mask")
NEEDS_EXTENSION = pytest.mark.skipif(not BUILT, reason="the C++ extension is not built")

SHOW = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, sparsify_kernels as kernels
index = kernels.random_mask(torch.zeros(2, 12, 1), seed=0).index.tolist()
print(json.dumps([kernels.backend_info(), [str(w.message) for w in caught], index, kernels.__file__]))
"""
MASK = [[0, 2, 5, 8, 9, 11], [0, 2, 6, 7, 8, 9]]


def show(folder: Path = ROOT, **env: str) -> tuple[dict[str, Any], list[str]]:
    """``backend_info()`` and the warnings of a fresh process that imports the package in ``folder``.

    Without ``site`` (-S): the import hook of an editable install would supply what the folder lacks.
    """
    path = os.pathsep.join([str(folder), *sys.path])
    done = subprocess.run(
        [sys.executable, "-S", "-c", SHOW],
        env=os.environ | {"PYTHONPATH": path} | env,
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    info, warned, index, file = json.loads(done.stdout)
    assert Path(file).is_relative_to(folder)
    assert index == MASK
    return info, [text for text in warned if "sparsify_kernels" in text]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A source tree of the package alone."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "sparsify_kernels", tmp_path / "sparsify_kernels", ignore=ignored)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    return tmp_path


def test_the_extension_is_there() -> None:
    """A skip is loud: with SPARSIFY_REQUIRE_EXT=1 a missing extension fails."""
    if os.environ.get("SPARSIFY_REQUIRE_EXT") == "1":
        assert BUILT, backend_info()["reasons"]
    elif not BUILT:
        pytest.skip(f"the C++ extension is not in use: {backend_info()['reasons']['cpp']}")
    assert backend_info()["random_mask"]["cpu"] == "cpp"
    assert backend_info()["isa"] in ("base", "avx2", "avx512")
    assert "cpp" not in backend_info()["reasons"]


def test_backend_info_lists_every_op() -> None:
    info = backend_info()
    ops = {"random_mask", "attention_scores", "key_tokens", "merge_tokens", "window_attention"}
    assert set(info) == ops | {"reasons", "isa"}
    for op in ops:
        assert set(info[op]) == {"cpu", "cuda"}
        assert set(info[op].values()) <= {"cpp", "triton", "reference"}


def test_the_reference_is_forced_at_import() -> None:
    info, warned = show(SPARSIFY_BACKEND="reference")
    assert info["random_mask"] == {"cpu": "reference", "cuda": "reference"}
    assert info["reasons"] == {"cpp": "SPARSIFY_BACKEND=reference", "triton": "SPARSIFY_BACKEND=reference"}
    assert info["isa"] is None
    assert warned == []  # it was asked for


@pytest.mark.slow
@pytest.mark.parametrize("op", ["random_mask", "attention_scores", "key_tokens", "merge_tokens", "window_attention"])
def test_the_reference_passes_the_tests_of_meanings_and_errors(op: str) -> None:
    folder = ROOT / "tests" / "sparsify_kernels" / op
    files = [str(file) for kind in ("op", "contract") for file in folder.glob(f"test_*_{kind}.py")]
    assert len(files) == 2
    pytest_ = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow")
    env = os.environ | {"SPARSIFY_BACKEND": "reference", "SPARSIFY_REQUIRE_EXT": "0"}
    done = subprocess.run([*pytest_, *files], env=env, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:]


@NEEDS_EXTENSION
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512", "avx512_bf16", "nonsense"])
def test_every_instruction_set_gives_the_same_masks(isa: str) -> None:
    """One that this machine lacks, or that does not exist, leaves the best one in use; bf16's is shown as AVX-512."""
    info, _ = show(SPARSIFY_ISA=isa)
    best = backend_info()["isa"]
    order = ["base", "avx2", "avx512"]
    expected = isa if isa in order and order.index(isa) <= order.index(best) else best
    if "SPARSIFY_ISA" not in os.environ:
        assert info["isa"] == expected


def test_without_the_extension_the_reference_serves_and_says_why(copy: Path) -> None:
    for binary in (copy / "sparsify_kernels").glob("*.so"):
        binary.unlink()
    (copy / "sparsify_kernels" / "_why_pure.txt").write_text("no C++ compiler: c++, g++, clang++ not found\n")
    info, warned = show(copy)
    assert info["random_mask"]["cpu"] == "reference"
    assert "no C++ compiler" in info["reasons"]["cpp"]
    assert "python -m sparsify_kernels.build" in info["reasons"]["cpp"]
    assert warned == [f"sparsify_kernels runs in plain PyTorch on the CPU: {info['reasons']['cpp']}"]


@NEEDS_EXTENSION
def test_a_stale_binary_is_noticed_and_not_used(copy: Path) -> None:
    info, warned = show(copy)
    assert info["random_mask"]["cpu"] == "cpp"
    assert warned == []
    source = copy / "csrc" / "random_mask.cpp"
    source.write_text(source.read_text() + "// changed\n")
    info, warned = show(copy)
    assert info["random_mask"]["cpu"] == "reference"
    assert "stale" in info["reasons"]["cpp"]
    assert len(warned) == 1
    assert "python -m sparsify_kernels.build" in warned[0]


@NEEDS_EXTENSION
def test_a_broken_binary_is_noticed_and_not_used(copy: Path) -> None:
    next((copy / "sparsify_kernels").glob("_C*.so")).write_bytes(b"no library")
    info, warned = show(copy)
    assert info["random_mask"]["cpu"] == "reference"
    assert "do not load" in info["reasons"]["cpp"]
    assert len(warned) == 1


@NEEDS_EXTENSION
def test_info_is_optional_and_agrees_with_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sparsify_kernels._info", reason="_info was not built: pybind11 was missing")
    info = _backends.build_info()
    assert info["isa"] == backend_info()["isa"]
    assert info["threads"] >= 1
    assert "TORCH_STABLE_ONLY" in info["flags"]
    assert info["cpu"]["avx2"] or info["isa"] == "base"
    monkeypatch.setitem(sys.modules, "sparsify_kernels._info", None)
    assert _backends.build_info() == {}


def test_the_hash_knows_every_source(copy: Path) -> None:
    before = source_hash(copy / "csrc")
    assert before == source_hash(csrc_folder())
    for path in (copy / "csrc").iterdir():
        text = path.read_text()
        path.write_text(text + " ")
        assert source_hash(copy / "csrc") != before, path
        path.write_text(text)
    assert source_hash(copy / "csrc") == before


def test_import_brings_in_no_model_library() -> None:
    heavy = "('timm', 'transformers', 'av', 'triton')"
    code = f"import sparsify_kernels, sys; print([m for m in {heavy} if m in sys.modules])"
    env = os.environ | {"PYTHONPATH": str(ROOT), "SPARSIFY_BACKEND": "reference"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert sparsify_kernels.__version__
