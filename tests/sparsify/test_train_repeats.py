"""A run repeats bit for bit on several threads of a CPU, the libraries' tables of relative positions included."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsify.config import Config
from sparsify.training.optim import ordered_sums
from sparsify.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("_silent_model")
Run = Callable[..., dict[str, Any]]
CPU = torch.device("cpu")


def settings() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.mark.usefixtures("_two_threads")
def test_the_gradient_of_a_table_is_added_up_in_order() -> None:
    """As in Swin-V2-T's last stage: 225 offsets, 64 x 64 pairs, 24 heads, which two threads share."""
    g = torch.Generator().manual_seed(0)
    table = torch.randn(225, 24, generator=g, requires_grad=True)
    index, slope = torch.randint(225, (4096,), generator=g), torch.randn(4096, 24, generator=g)
    expected = torch.zeros(225, 24)
    for row, of_row in zip(index.tolist(), slope, strict=True):
        expected[row] += of_row
    with ordered_sums(CPU):
        for _ in range(20):
            assert torch.equal(torch.autograd.grad(table[index], table, slope)[0], expected)


@pytest.mark.parametrize("before", [(False, False, True), (True, True, True), (True, False, True), (True, True, False)])
def test_ordered_sums_leaves_pytorch_as_it_was(before: tuple[bool, bool, bool]) -> None:
    first = settings()
    try:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]
        with contextlib.suppress(ValueError), ordered_sums(CPU):  # a user's stricter choice stays
            assert settings() == (True, before[1] or not before[0], before[2] and before[0])
            raise ValueError("amid")
        assert settings() == before
        with ordered_sums(torch.device("cuda")):
            assert settings() == before
    finally:
        torch.use_deterministic_algorithms(first[0], warn_only=first[1])
        torch.utils.deterministic.fill_uninitialized_memory = first[2]


def test_every_scattered_gradient_of_a_run_is_added_up_in_order(
    run: Run, tiny_config: Config, scattered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last epoch sees whole clips, by the libraries' own windows."""
    take = Trainer.take_step

    def watched(*args: Any, **kwargs: Any) -> None:
        with scattered:
            take(*args, **kwargs)

    monkeypatch.setattr(Trainer, "take_step", watched)
    run(config=tiny_config.replace(**{"train.epochs": 2}))
    assert scattered.found
    assert all(ordered for _, ordered in scattered.found)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("_two_threads")
def test_two_runs_on_two_threads_are_one_run(run: Run, tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config.replace(**{"train.epochs": 2, "train.muon": 3.0, "train.matching": 1.0})
    for name in ("a", "b"):
        run(name, config)
    a, b = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("a", "b"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
