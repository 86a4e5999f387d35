"""The build: failures are one sentence, nothing is half-replaced, an install without torch is pure and says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from sparsify_kernels import _build
from sparsify_kernels._build import BuildError

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("csrc", "sparsify", "sparsify_kernels", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What a fresh clone has, as far as packaging looks at it."""
    folder = tmp_path / "tree"
    folder.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_why_pure.txt")
            )
        else:
            shutil.copy2(source, folder / name)
    return folder


def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which ``import torch`` fails, and a build without it may."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('no torch here')\n")
    kept = {name: value for name, value in os.environ.items() if name != "SPARSIFY_REQUIRE_EXT"}
    return kept | {"PYTHONPATH": str(hidden)}


def run_setup(tree: Path, env: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *command], cwd=tree, env=env, capture_output=True, text=True, check=False
    )


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler: no-such-compiler not found"):
        _build.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_says_what_the_compiler_said_and_replaces_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'random_mask.cpp:1: error: bad weather'\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    target = tmp_path / "target"
    target.mkdir()
    (target / "_C.abi3.so").write_text("the old one")
    for ninja in (None, _build._ninja()):
        monkeypatch.setattr(_build, "_ninja", lambda found=ninja: found)
        with pytest.raises(BuildError, match=r"the build failed: .*bad weather"):
            _build.build(target)
        assert [p.read_text() for p in target.iterdir()] == ["the old one"]


def test_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.__version__", "2.9.1+cpu")
    with pytest.raises(BuildError, match=r"torch 2.9.1\+cpu is older than 2.10"):
        _build.build(tmp_path)


def test_ninja_and_plain_commands_are_the_same_steps(tmp_path: Path) -> None:
    steps = [(["c++", "-c", "a b.cpp", '-DX="1$"'], tmp_path / "a b.o", [tmp_path / "a b.cpp"])]
    text = _build._ninja_file(steps)
    assert "a$ b.o: compile" in text
    assert "line = c++ -c 'a b.cpp' '-DX=\"1$$\"'" in text


def test_a_wheel_made_without_torch_is_pure_and_carries_reason_and_sources(tree: Path, tmp_path: Path) -> None:
    done = run_setup(tree, without_torch(tmp_path), "bdist_wheel", "--dist-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "installing in pure Python: torch is not installed where the build ran" in done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert not any(name.endswith(".so") for name in names)
        assert "torch is not installed" in archive.read("sparsify_kernels/_why_pure.txt").decode()
    assert {"sparsify_kernels/py.typed", "sparsify/py.typed", "sparsify_kernels/_csrc/common.h"} <= set(names)
    assert sorted(n.rsplit("/", 1)[1] for n in names if "/_csrc/" in n) == sorted(os.listdir(ROOT / "csrc"))


def test_a_missing_extension_is_an_error_when_required(tree: Path, tmp_path: Path) -> None:
    env = without_torch(tmp_path) | {"SPARSIFY_REQUIRE_EXT": "1"}
    done = run_setup(tree, env, "build")
    assert done.returncode != 0
    assert "SPARSIFY_REQUIRE_EXT=1, and not built: torch is not installed" in done.stderr


def test_a_source_distribution_has_all_it_takes_to_build(tree: Path, tmp_path: Path) -> None:
    done = run_setup(tree, dict(os.environ), "sdist", "--dist-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        names = {name.split("/", 1)[1] for name in sources.getnames() if "/" in name}
    assert {f"csrc/{name}" for name in os.listdir(ROOT / "csrc")} <= names
    assert {"setup.py", "pyproject.toml", "sparsify_kernels/_build.py", "LICENSE"} <= names


@pytest.mark.slow
def test_a_pure_install_builds_its_kernels_later(tree: Path, tmp_path: Path) -> None:
    """A wheel without kernels, installed; then ``python -m sparsify_kernels.build``; then the same masks from C++."""
    run_setup(tree, without_torch(tmp_path), "bdist_wheel", "--dist-dir", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *sys.path])}
    show = "import sparsify_kernels as k; print(k.__file__, k.backend_info()['random_mask']['cpu'])"

    def python(*command: str) -> str:
        # Without site (-S): the import hook of an editable install would supply what the wheel lacks.
        done = subprocess.run(
            [sys.executable, "-S", "-W", "ignore", *command],
            env=env,
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert python("-c", show).split() == [str(site / "sparsify_kernels" / "__init__.py"), "reference"]
    assert "_C.abi3.so" in python("-m", "sparsify_kernels.build")
    assert python("-c", show).split()[1] == "cpp"
