"""The ops on a GPU: time against the best baseline and against the floor that bytes and arithmetic set.

    python -m benchmarks.gpu [--json FILE] [--only OP] [--quick]

The machine's own copy bandwidth and bf16 matrix rate are measured first. Each op's result is compared with its
baseline's before it is timed: no speed-up over something else. A kernel's *floor* is the time that its bytes take at
the copy bandwidth or its FLOP at the matrix rate, whichever is longer; its share says how near it comes. Times are
medians of calls between which the cache is overwritten.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

import sparsify_kernels
from benchmarks.gpu_cases import Case, cases, seconds


class Machine(NamedTuple):
    """What this GPU reaches: bytes a second of a copy (read and write together), bf16 FLOP a second of a product."""

    name: str
    copy: float
    matrix: float


class Row(NamedTuple):
    """A measured case: times in ms."""

    op: str
    what: str
    ours: float
    floor: float
    share: float  # floor / ours
    baselines: dict[str, float]
    target: str
    reached: bool | None


def machine() -> Machine:
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    copy, product = seconds(lambda: target.copy_(source), 20), seconds(lambda: a @ b, 20)
    return Machine(torch.cuda.get_device_name(), 2 * source.nbytes / copy, 2 * 8192**3 / product)


def judge(case: Case, here: Machine, timed: Callable[[Callable[[], Any]], float]) -> Row:
    """Time ``case`` with ``timed`` (seconds); ``RuntimeError`` when its result is not the baseline's."""
    if not case.check():
        raise RuntimeError(f"{case.op} {case.what}: the result differs from the baseline's; nothing was timed")
    ours = timed(case.ours)
    baselines = {}
    for name, function in case.baselines.items():
        with suppress(torch.OutOfMemoryError):
            baselines[name] = timed(function)
    floor = max(case.bytes / here.copy, case.flop / here.matrix)
    target, reached = "", None
    if case.target is not None and case.target[1] == "floor":
        target, reached = f"<= {case.target[0]:.2f} x floor", ours <= case.target[0] * floor
    elif case.target is not None and case.target[1] in baselines:
        target = f"<= {case.target[0]:.2f} x {case.target[1]}"
        reached = ours <= case.target[0] * baselines[case.target[1]]
    times = {name: 1e3 * t for name, t in baselines.items()}
    return Row(case.op, case.what, 1e3 * ours, 1e3 * floor, floor / ours, times, target, reached)


def render(rows: list[Row], here: Machine) -> str:
    lines = [
        f"{here.name}: copies {here.copy / 1e9:,.0f} GB/s, multiplies bf16 at {here.matrix / 1e12:,.0f} TFLOP/s",
        f"{'op':<17} {'case':<46} {'ours ms':>8} {'floor':>8} {'share':>6}  baselines: ms (times ours); target",
    ]
    for row in rows:
        others = ", ".join(f"{n} {t:.3f} ({t / row.ours:.2f})" for n, t in row.baselines.items())
        verdict = "" if row.reached is None else f"; {row.target}: {'reached' if row.reached else 'NOT reached'}"
        lines.append(
            f"{row.op:<17} {row.what:<46} {row.ours:8.3f} {row.floor:8.3f} {row.share:6.0%}  {others}{verdict}"
        )
    return "\n".join(lines)


def with_best(row: Row, case: Case) -> Row:
    """A target against ``best`` is one against the fastest baseline."""
    if case.target is None or case.target[1] != "best" or not row.baselines:
        return row
    name = min(row.baselines, key=row.baselines.__getitem__)
    reached = row.ours <= case.target[0] * row.baselines[name]
    return row._replace(target=f"<= {case.target[0]:.2f} x {name}", reached=reached)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows and the machine there, too")
    parser.add_argument("--only", metavar="OP", help="only cases whose op begins so")
    parser.add_argument("--quick", action="store_true", help="20 rounds in place of 100")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU here: GPU: not measured", file=sys.stderr)
        return 1
    rounds = 20 if args.quick else 100
    here = machine()
    rows = []
    for case in cases(rounds):
        if args.only is None or case.op.startswith(args.only):
            rows.append(with_best(judge(case, here, lambda f: seconds(f, rounds)), case))
            print(render(rows[-1:], here).splitlines()[-1], file=sys.stderr, flush=True)
    print(render(rows, here))
    if args.json is not None:
        info = {"torch": torch.__version__, "python": platform.python_version(), **sparsify_kernels.backend_info()}
        data = {"machine": here._asdict(), "versions": info, "rows": [row._asdict() for row in rows]}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
