"""The tests of the C++ kernels on a build that checks every access and every operation: ``make sanitize``.

AddressSanitizer and UndefinedBehaviorSanitizer are compiled into a copy of the package under build/sanitize, beside its
sources and tests: the usual build stays as it is, and tests that start processes of their own start them in the copy.
Python and torch are not instrumented, but their allocator is, so a kernel that leaves a tensor is caught.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from sparsify_kernels._build import build

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build" / "sanitize"
COPIED = ("csrc", "sparsify_kernels", "tests/sparsify_kernels", "tests/conftest.py", "pyproject.toml")
OPS = ("random_mask", "attention_scores", "key_tokens", "merge_tokens", "window_attention")

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g")
RUN_TIME = {
    # Python keeps memory until it ends. New memory is full of NaN: what a kernel reads before it writes it, shows.
    "ASAN_OPTIONS": "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1073741824",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}

# Left out: other backends; how much memory there is, which the sanitiser adds to; what other compilers make.
SELECTED = "not triton and not memory and not compile and not lesser_instruction_sets"
ISAS = ("base", "avx2", "avx512", "avx512_bf16")  # the last is shown as the one before it


def make_tree() -> None:
    """The copy and its sanitised module; object files of an earlier run are used again."""
    for name in COPIED:
        source, target = ROOT / name, TREE / name
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_why_pure.txt"))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    build(TREE / "sparsify_kernels", TREE / "objects", FLAGS)


def preloaded() -> str:
    """libasan of the compiler that built, which has to come before all other libraries, and libstdc++, in which it
    looks for the function that throws before torch has loaded it."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    found = []
    for name in ("libasan.so", "libstdc++.so"):
        asked = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        library = Path(asked.stdout.strip())
        if not library.is_absolute():
            raise SystemExit(f"sanitize: {compiler[0]} has no {name}")
        found.append(str(library.resolve()))
    return " ".join(found)


def environment(isa: str | None) -> dict[str, str]:
    """With ``isa`` None the kernels use whatever the machine has, the tiles of AMX too, which no name stands for."""
    env = os.environ | RUN_TIME | {"LD_PRELOAD": preloaded(), "SPARSIFY_REQUIRE_EXT": "1"}
    env.pop("SPARSIFY_ISA", None)
    return env if isa is None else env | {"SPARSIFY_ISA": isa}


def best_isa() -> str:
    """The instruction set of this machine, as the copy sees it; raises unless it is the copy that is imported."""
    code = "import sparsify_kernels as k; print(k.__file__, k.backend_info()['isa'])"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=TREE, env=environment(None), stdout=subprocess.PIPE, text=True, check=True)
    file, isa = done.stdout.split()
    if not Path(file).is_relative_to(TREE):
        raise SystemExit(f"sanitize: {file} was imported, not the copy in {TREE}")
    return isa


def main() -> int:
    parser = argparse.ArgumentParser(description="Test the C++ kernels under ASan and UBSan.", allow_abbrev=False)
    parser.add_argument("--isa", choices=ISAS, help="one instruction set instead of all")
    parser.add_argument("-k", default=None, help="only tests that match, as in pytest")
    given = parser.parse_args()
    make_tree()
    tests = [f"tests/sparsify_kernels/{op}" for op in OPS]
    chosen = SELECTED if given.k is None else f"({SELECTED}) and ({given.k})"
    # Only Python's own output is captured: what a sanitiser says before it ends the process is seen.
    options = ["-q", "-x", "--capture=sys", "-p", "no:cacheprovider", "-m", "not slow", "-k", chosen]
    options += ["--numprocesses", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
    command = [sys.executable, "-m", "pytest", *options]
    best = best_isa()
    isas = ISAS if best == "avx512" else ISAS[: ISAS.index(best) + 1]
    runs = (None, *isas) if given.isa is None else (given.isa,)
    for isa in runs:
        print(f"sanitize: isa {isa or 'as detected'}", flush=True)
        done = subprocess.run([*command, *tests], cwd=TREE, env=environment(isa), check=False)
        if done.returncode != 0:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
