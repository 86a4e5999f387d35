"""Learning rates, parameter groups and precision: literal values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify.config import TrainConfig
from sparsify.training import optim
from sparsify.training.optim import build_optimizer, choose_precision, lr_factor, parameter_groups, set_learning_rates


class Net(nn.Module):
    """One of each kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 2), nn.LayerNorm(4))
        self.words = nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.latents = nn.Parameter(torch.zeros(3, 4))
        self.gate = nn.Parameter(torch.zeros(()))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def encoder_parameters(self) -> list[nn.Parameter]:
        return list(self.encoder.parameters())


@pytest.mark.parametrize(
    ("progress", "factor"),
    [
        (0.0, 0.0),
        (0.05, 0.5),
        (0.1, 1.0),
        (0.325, 0.8535533905932737),
        (0.55, 0.5),
        (0.775, 0.14644660940672627),
        (1, 0),
    ],
)
def test_schedule_is_linear_then_a_half_cosine(progress: float, factor: float) -> None:
    assert lr_factor(progress, warmup=0.1) == pytest.approx(factor, abs=1e-12)


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    assert lr_factor(0.0, warmup=0.0) == 1.0


def test_only_the_matrices_of_linear_maps_decay_and_encoders_have_their_own_rate() -> None:
    net = Net()
    config = TrainConfig(lr=1e-3, encoder_lr=1e-5, weight_decay=0.2)
    names = {id(p): name for name, p in net.named_parameters()}
    found = {
        (group["encoder"], group["lr"], group["weight_decay"]): sorted(names[id(p)] for p in group["params"])
        for group in parameter_groups(net, config)
    }
    assert found == {
        (True, 1e-5, 0.2): ["encoder.0.weight"],
        (True, 1e-5, 0.0): ["encoder.0.bias", "encoder.1.bias", "encoder.1.weight"],
        (False, 1e-3, 0.2): ["attention.in_proj_weight", "attention.out_proj.weight"],
        (False, 1e-3, 0.0): [
            "attention.in_proj_bias",
            "attention.out_proj.bias",
            "gate",
            "latents",
            "words.weight",
        ],
    }


def test_the_factor_multiplies_each_group_s_own_peak() -> None:
    optimizer = build_optimizer(Net(), TrainConfig(lr=1e-3, encoder_lr=1e-5), torch.device("cpu"))
    set_learning_rates(optimizer, 0.5)
    set_learning_rates(optimizer, 0.25)  # of the peak, not of what the last step left
    assert {(g["encoder"], g["lr"]) for g in optimizer.param_groups} == {(True, 2.5e-6), (False, 2.5e-4)}


@pytest.mark.parametrize(
    ("features", "name", "reason"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "fp32", "neither AVX-512 BF16 nor AMX"),
        ({"avx512_bf16": True}, "bf16", "AVX-512 BF16"),
        ({"avx512_bf16": True, "amx_bf16": True}, "bf16", "AVX-512 BF16 and AMX BF16"),
        ({}, "fp32", "neither"),
    ],
)
def test_auto_takes_bf16_only_from_a_cpu_that_multiplies_it(
    features: dict[str, bool], name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim.torch.cpu, "get_capabilities", lambda: features)
    chosen = choose_precision("auto", torch.device("cpu"))
    assert chosen.name == name
    assert reason in chosen.reason
    assert choose_precision("bf16", torch.device("cpu")) == ("bf16", "as configured")
