"""What every benchmark prints: the machine, the shape, the ratio to each baseline in the same run, bytes a second."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsify_kernels


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def pytest_report_header() -> list[str]:
    info = sparsify_kernels.backend_info()
    machine = f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, isa {info['isa']}"
    served = {op: backends["cpu"] for op, backends in info.items() if isinstance(backends, dict) and "cpu" in backends}
    return [f"machine: {machine}", f"backends: {served}"]


class Table:
    """The medians of one group, printed as ratios to ours when the session ends."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, tuple[float, int]]] = {}

    def measure(
        self, benchmark: Any, group: str, name: str, function: Callable[[], Any], moved: int, rounds: int = 60
    ) -> None:
        """Benchmark ``function`` as ``name`` in ``group``; ``moved``: the bytes it must read and write."""
        benchmark.group = group
        benchmark.extra_info["bytes"] = moved
        benchmark.pedantic(function, rounds=rounds, iterations=1, warmup_rounds=max(1, rounds // 6))
        stats = benchmark.stats
        if stats is not None:
            self.rows.setdefault(group, {})[name] = (statistics.median(stats.stats.data), moved)

    def print(self) -> None:
        for group, rows in self.rows.items():
            ours = rows["ours"][0]
            print(f"\n{group}")
            for name, (seconds, moved) in rows.items():
                speed = f"{moved / seconds / 1e9:6.2f} GB/s"
                print(f"  {name:<28} {seconds * 1e3:8.3f} ms  {speed}  {seconds / ours:6.2f} x ours")
            for name in (n for n in rows if n.startswith("memcpy")):
                print(f"  ours at {rows[name][0] / ours:.0%} of the speed of {name}")


@pytest.fixture(scope="session")
def table() -> Any:
    collected = Table()
    yield collected
    collected.print()
