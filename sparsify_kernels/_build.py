"""Compiles the CPU kernels: for setup.py, and for ``python -m sparsify_kernels.build``.

Two modules come out of ``csrc/``, next to this file: ``_C`` (the ops, on torch's stable ABI: one binary for every
torch from 2.10 and every Python from 3.10) and ``_info`` (pybind11, for this Python; left out with a note where
pybind11 is missing). ``setup.py`` loads this file by its path: at its top it imports nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BuildError", "build", "csrc_folder", "source_hash"]

PACKAGE = Path(__file__).resolve().parent
WHY_PURE = "_why_pure.txt"  # beside this file: the reason why an install has no compiled kernels

# The stable ABI of torch 2.10, seen by later versions too.
STABLE_ABI = ("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY")
FLAGS = ("-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")


class BuildError(Exception):
    """The kernels cannot be built here; one sentence that says why."""


@dataclass(frozen=True)
class _Module:
    """A Python extension module: which sources, compiled how."""

    name: str
    suffix: str
    sources: tuple[Path, ...]
    flags: tuple[str, ...]
    libraries: tuple[str, ...]


def csrc_folder() -> Path:
    """The C++ sources: beside the package in a source tree, inside it (``_csrc``) in an install."""
    for folder in (PACKAGE.parent / "csrc", PACKAGE / "_csrc"):
        if (folder / "module.cpp").exists():
            return folder
    raise BuildError("the C++ sources are neither beside nor inside the package")


def source_hash(csrc: Path) -> str:
    """A short hash of every file in ``csrc``: compiled in, and compared at import."""
    digest = hashlib.sha256()
    for path in sorted(csrc.iterdir()):
        if path.suffix in (".cpp", ".h", ".inl"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def build(target: Path, work: Path | None = None, extra: tuple[str, ...] = ()) -> list[Path]:
    """Compile into the folder ``target``, with ninja if there is one; ``work`` keeps the object files for the next
    time. ``extra`` are further flags for compiler and linker, which win over ours.

    Returns the files written. Raises ``BuildError``; what the compiler said has gone to stderr by then.
    """
    compiler = _compiler()
    modules = _modules()
    target.mkdir(parents=True, exist_ok=True)
    if work is None:
        with tempfile.TemporaryDirectory(prefix="sparsify-build-") as folder:
            return _compile(compiler, modules, target, Path(folder), extra)
    work.mkdir(parents=True, exist_ok=True)
    return _compile(compiler, modules, target, work, extra)


def _compiler() -> list[str]:
    """The C++ compiler: ``CXX``, else the first of c++, g++ and clang++."""
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if command and shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler: {named or 'c++, g++, clang++'} not found")


def _modules() -> list[_Module]:
    """What to build here; ``BuildError`` without a torch that has the stable ABI."""
    try:
        import torch
    except ImportError:
        raise BuildError("torch is not installed where the build ran (use pip's --no-build-isolation)") from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        raise BuildError(f"torch {torch.__version__} is older than 2.10")
    root = Path(torch.__file__).parent
    csrc = csrc_folder()
    python = f"-I{sysconfig.get_path('include')}"
    version = f'-DSPARSIFY_SOURCE_HASH="{source_hash(csrc)}"'
    ops = tuple(path for path in sorted(csrc.glob("*.cpp")) if path.name != "info.cpp")
    flags = (*FLAGS, *STABLE_ABI, version, python, f"-isystem{root / 'include'}")
    libraries = (f"-L{root / 'lib'}", "-ltorch_cpu")
    modules = [_Module("_C", ".abi3.so", ops, flags, libraries)]
    if importlib.util.find_spec("pybind11") is None:
        print("sparsify_kernels: pybind11 is not installed: building without _info", file=sys.stderr)
        return modules
    import pybind11

    # It answers a few questions and computes nothing: not worth the optimiser's ten seconds.
    used = f'-DSPARSIFY_BUILD_FLAGS="{" ".join((*FLAGS, *STABLE_ABI))}"'
    flags = (*FLAGS, "-O0", version, used, python, f"-isystem{pybind11.get_include()}")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return [*modules, _Module("_info", suffix, (csrc / "info.cpp",), flags, ())]


def _compile(
    compiler: list[str], modules: list[_Module], target: Path, work: Path, extra: tuple[str, ...]
) -> list[Path]:
    """Run the compile and link commands; move the results into ``target`` once all are there."""
    link = ["-shared"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]
    steps: list[tuple[list[str], Path, list[Path]]] = []  # command, output, inputs
    results = []
    for module in modules:
        objects = []
        for source in module.sources:
            made = work / f"{module.name}.{source.stem}.o"
            steps.append(([*compiler, *module.flags, *extra, "-c", str(source), "-o", str(made)], made, [source]))
            objects.append(made)
        result = work / (module.name + module.suffix)
        command = [*compiler, *link, *extra, *map(str, objects), "-o", str(result), *module.libraries]
        steps.append((command, result, objects))
        results.append(result)
    ninja = _ninja()
    if ninja is None:
        for command, _, _ in steps:
            _run(command)
    else:
        (work / "build.ninja").write_text(_ninja_file(steps), encoding="utf-8")
        _run([ninja, "-C", str(work)])
    written = []
    for result in results:
        # Replaced, not overwritten: a process that has the old one loaded keeps it.
        fresh = target / f".{result.name}.{os.getpid()}"
        shutil.copy2(result, fresh)
        written.append(fresh.replace(target / result.name))
    return written


def _ninja() -> str | None:
    """The ninja of this environment (its scripts folder need not be on PATH), else the one on PATH."""
    beside = Path(sysconfig.get_path("scripts")) / "ninja"
    return str(beside) if beside.exists() else shutil.which("ninja")


def _ninja_file(steps: list[tuple[list[str], Path, list[Path]]]) -> str:
    """The steps as a ninja file; the compilers say which headers they read."""

    def escape(text: object) -> str:
        return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["rule compile", "  command = $line -MD -MF $out.d", "  depfile = $out.d", "  deps = gcc"]
    lines += ["rule link", "  command = $line"]
    for command, output, inputs in steps:
        rule = "compile" if output.suffix == ".o" else "link"
        lines.append(f"build {escape(output)}: {rule} {' '.join(map(escape, inputs))}")
        lines.append(f"  line = {shlex.join(command).replace('$', '$$')}")
    return "\n".join(lines) + "\n"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode == 0:
        return
    sys.stderr.write(done.stdout)
    said = [line for line in done.stdout.splitlines() if "error" in line] or done.stdout.splitlines() or ["no output"]
    raise BuildError(f"the build failed: {said[0].strip()}")
