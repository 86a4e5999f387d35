"""Set-up shared by all tests: the Triton interpreter where there is no GPU, poisoned allocations, few threads."""

from __future__ import annotations

import os

# Read when a kernel is decorated, by Triton's own library too: it has to be set before anything imports Triton.
if not os.path.exists("/dev/nvidia0") and not os.path.exists("/dev/kfd"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Processes that share the cores: a thread that waits must not spin where another one works. Read as torch is loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped, saying so, where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU: the kernel ran under the Triton interpreter only"))


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """No test depends on which ran before it."""
    torch.manual_seed(0)
