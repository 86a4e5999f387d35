"""Compiles the Triton kernels of one op for real GPUs, without one: ``python triton_targets.py random_mask`` prints a
JSON line a case; with ``--first``, of each kernel the first case alone.

A script of its own, because kernels decorated under ``TRITON_INTERPRET=1`` cannot be compiled. ``TARGETS`` of the
op's ``triton.py`` lists the cases: a kernel, the types of its run-time arguments (``i32:16``: a multiple of 16), its
compile-time arguments (``num_stages`` among them, if it is not the compiler's choice; a dict holds one value for
``cuda``, another for ``hip``) and its warps.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Name, target, shared memory in bytes that one program may have.
GPUS = [
    ("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024),
    ("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024),
    ("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024),
    ("sm_120", GPUTarget("cuda", 120, 32), 99 * 1024),
    ("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024),
]


ATOMICS = {"cuda": r"\b(?:atom|red)\.[\w.:]+", "hip": r"\b\w+_atomic_\w+"}


def spilled_on_nvidia(cubin: bytes) -> int:
    """Bytes of stack a thread uses: spilled registers, as our kernels have no local arrays."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    stacks = re.findall(r"STACK:(\d+)", text)
    if not stacks:
        raise RuntimeError(f"no resource usage in {text!r}")
    return max(map(int, stacks))


def spilled_on_amd(assembly: str) -> int:
    """Spilled registers and bytes of scratch, from the kernel's metadata."""
    counts = re.findall(r"\.(?:vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size):\s*(\d+)", assembly)
    if len(counts) < 3:
        raise RuntimeError("no spill counts in the assembly")
    return max(map(int, counts))


def compile_case(case: tuple[Any, str, dict[str, Any], int], target: GPUTarget) -> tuple[Any, dict[str, Any]]:
    """The compiled kernel, and its compile-time arguments on ``target``."""
    kernel, types, constants, warps = case
    constants = {n: c[target.backend] if isinstance(c, dict) else c for n, c in constants.items()}
    options = {"num_warps": warps} | {n: constants.pop(n) for n in ("num_stages",) if n in constants}
    hinted = dict(zip((n for n in kernel.arg_names if n not in constants), types.split(), strict=True))
    signature = dict.fromkeys(kernel.arg_names, "constexpr") | {n: t.removesuffix(":16") for n, t in hinted.items()}
    place = kernel.arg_names.index
    attributes = {(place(n),): [["tt.divisibility", 16]] for n, t in hinted.items() if t.endswith(":16")}
    source = ASTSource(kernel, signature, {(place(n),): c for n, c in constants.items()}, attributes)
    return triton.compile(source, target=target, options=options), constants | options


def main(op: str, *, first: bool) -> None:
    cases = importlib.import_module(f"sparsify_kernels.{op}.triton").TARGETS
    if first:
        cases = list({case[0]: case for case in reversed(cases)}.values())
    for name, target, shared_limit in GPUS:
        for kernel, *rest in cases:
            compiled, constants = compile_case((kernel, *rest), target)
            nvidia = target.backend == "cuda"
            spilled = spilled_on_nvidia(compiled.asm["cubin"]) if nvidia else spilled_on_amd(compiled.asm["amdgcn"])
            case = {"gpu": name, "kernel": kernel.__name__, "constants": constants, "spilled": spilled}
            case["atomics"] = re.findall(ATOMICS[target.backend], compiled.asm["ptx" if nvidia else "amdgcn"])
            print(json.dumps(case | {"shared": compiled.metadata.shared, "shared_limit": shared_limit}))


if __name__ == "__main__":
    main(sys.argv[1], first="--first" in sys.argv)
