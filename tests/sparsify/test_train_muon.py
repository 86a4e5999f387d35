"""Muon for matrices, AdamW for the rest: what a step does, in numbers, and that it survives a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sparsify.config import TrainConfig
from sparsify.training.muon import MuonAdamW, orthogonalised
from sparsify.training.optim import build_optimizer, parameter_groups
from sparsify.training.run import RunState, restore_optimizer, write_state


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 2), nn.Flatten(), nn.Linear(8, 6))
        self.tall, self.wide = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(self.tall(self.encoder(x)).tanh())

    def encoder_parameters(self) -> list[nn.Parameter]:
        return list(self.encoder.parameters())


def run(net: Net, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(step))
        net(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 6, 20), (2, 32, 128)])
def test_singular_values_become_about_one_and_vectors_stay(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    found = orthogonalised(x)
    values = torch.linalg.svdvals(found)
    # A direction a thousand times weaker than the strongest needs more than five steps.
    assert (values < 1.2).all()
    assert values.median() > 0.68
    turned = u.mT @ found @ v.mT  # the same singular vectors: a diagonal remains
    torch.testing.assert_close(turned, torch.diag_embed(turned.diagonal(dim1=1, dim2=2)), atol=2e-5, rtol=0)
    assert (turned.diagonal(dim1=1, dim2=2) > 0).all()


def test_a_matrix_of_a_stack_does_not_depend_on_the_others() -> None:
    x = torch.randn(5, 8, 12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalised(x)[3:4], orthogonalised(x[3:4]), atol=1e-6, rtol=0)


def test_a_zero_gradient_moves_nothing_but_decay() -> None:
    p = nn.Parameter(torch.full((2, 3), 4.0))
    p.grad = torch.zeros(2, 3)
    MuonAdamW([{"params": [p], "muon": True}], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(p.detach(), torch.full((2, 3), 3.8))  # 4 * (1 - 0.5 * 0.1)


def test_the_first_step_goes_against_the_gradient_with_the_step_size_of_adamw() -> None:
    for shape in ((16, 64), (64, 16)):
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        MuonAdamW([{"params": [p], "muon": True}], lr=0.1, weight_decay=0.0).step()
        assert (p * p.grad).sum() < 0
        assert p.square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=0.2)


def test_the_other_groups_are_adamw_to_the_bit() -> None:
    torch.manual_seed(0)
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    groups = [parameter_groups(net, TrainConfig(weight_decay=0.1)) for net in (ours, theirs)]
    run(ours, MuonAdamW(groups[0], betas=(0.9, 0.98), fused=True), 5)
    run(theirs, torch.optim.AdamW(groups[1], betas=(0.9, 0.98), fused=True), 5)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_muon_takes_the_matrices_of_linear_maps_at_its_multiple_of_their_rate() -> None:
    net = Net()
    names = {id(p): name for name, p in net.named_parameters()}
    config = TrainConfig(lr=1e-3, encoder_lr=1e-4, muon=3.0)
    found = {
        (round(group["peak_lr"], 9), group["weight_decay"] > 0): sorted(names[id(p)] for p in group["params"])
        for group in parameter_groups(net, config)
        if group["muon"]
    }
    assert found == {(3e-4, True): ["encoder.2.weight"], (3e-3, True): ["tall.weight", "wide.weight"]}
    with pytest.raises(ValueError, match="matrices only"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(3))], "muon": True}])


def test_a_saved_and_restored_optimiser_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, config = Net(), TrainConfig(muon=2.0)
    optimizer = build_optimizer(net, config, torch.device("cpu"))
    assert isinstance(optimizer, MuonAdamW)
    run(net, optimizer, 3)
    write_state(tmp_path, RunState(), net, optimizer)
    again = Net()
    again.load_state_dict(net.state_dict())
    other = build_optimizer(again, config, torch.device("cpu"))
    restore_optimizer(tmp_path, again, other)
    run(net, optimizer, 3, first=3)
    run(again, other, 3, first=3)
    for (name, a), b in zip(net.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
