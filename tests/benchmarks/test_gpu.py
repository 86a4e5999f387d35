"""The GPU benchmark's arithmetic and baselines, without a GPU: what it prints must be right when there is one."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu, gpu_cases
from sparsify_kernels import KeyTokens, key_tokens, merge_tokens


def ours() -> str:
    return "ours"


def slow() -> str:
    return "slow"


def fast() -> str:
    return "fast"


TIMES = {ours: 0.004, slow: 0.020, fast: 0.006}


@pytest.fixture
def here():
    return gpu.Machine("a GPU", copy=1e12, matrix=1e15)


def case(**changes):
    fields = {"op": "op", "what": "B1", "ours": ours, "baselines": {"slow": slow, "fast": fast}, "bytes": 10**9}
    return gpu_cases.Case(**fields | {"flop": 10**12} | changes)


@pytest.mark.parametrize(
    ("changes", "floor", "target", "reached"),
    [
        ({}, 1.0, "", None),
        ({"bytes": 2 * 10**9}, 2.0, "", None),
        ({"flop": 3 * 10**12}, 3.0, "", None),  # more arithmetic than bytes
        ({"target": (0.5, "fast")}, 1.0, "<= 0.50 x fast", False),
        ({"target": (0.7, "fast")}, 1.0, "<= 0.70 x fast", True),
        ({"target": (0.5, "slow")}, 1.0, "<= 0.50 x slow", True),
        ({"target": (0.5, "best")}, 1.0, "<= 0.50 x fast", False),
        ({"target": (0.7, "best")}, 1.0, "<= 0.70 x fast", True),
        ({"target": (4.1, "floor")}, 1.0, "<= 4.10 x floor", True),
        ({"target": (3.9, "floor")}, 1.0, "<= 3.90 x floor", False),
    ],
)
def test_floor_share_and_target(here, changes, floor, target, reached):
    one = case(**changes)
    row = gpu.with_best(gpu.judge(one, here, TIMES.__getitem__), one)
    assert row.ours == pytest.approx(4.0)
    assert row.floor == pytest.approx(floor)
    assert row.share == pytest.approx(floor / 4.0)
    assert row.baselines == pytest.approx({"slow": 20.0, "fast": 6.0})
    assert (row.target, row.reached) == (target, reached)
    text = gpu.render([row], here)
    assert "slow 20.000 (5.00), fast 6.000 (1.50)" in text
    assert ("NOT reached" in text) == (reached is False)
    assert text.startswith("a GPU: copies 1,000 GB/s, multiplies bf16 at 1,000 TFLOP/s\n")


def test_a_wrong_result_is_not_timed(here):
    with pytest.raises(RuntimeError, match="op B1: the result differs"):
        gpu.judge(case(check=lambda: False), here, TIMES.__getitem__)


def test_a_baseline_that_needs_too_much_memory_is_left_out(here):
    def timed(function):
        if function is slow:
            raise torch.OutOfMemoryError
        return TIMES[function]

    assert gpu.judge(case(), here, timed).baselines == pytest.approx({"fast": 6.0})


@pytest.mark.parametrize("form", ["index_add", "scatter_reduce", "one-hot bmm"])
def test_the_baselines_of_merging_merge(form):
    g = torch.Generator().manual_seed(0)
    x, metric = torch.randn(2, 40, 24, generator=g), torch.randint(-2, 3, (2, 40, 8), generator=g).float()
    index = torch.stack([torch.randperm(40, generator=g)[:10].sort().values for _ in range(2)])
    merged = merge_tokens(x, metric, KeyTokens(index, torch.full((2,), 10))).tokens
    torch.testing.assert_close(gpu_cases.merge_eager(x, metric, index, form), merged)


def test_the_baseline_of_key_tokens_picks_them():
    scores = torch.rand(5, 77)
    assert torch.equal(gpu_cases.key_eager(scores), key_tokens(scores).index)


def test_no_nearer_than_twice_the_baseline_is_an_error():
    truth, other = torch.zeros(3, dtype=torch.float64), torch.full((3,), 0.01)
    assert gpu_cases.close(torch.full((3,), 0.019), other, truth)
    assert not gpu_cases.close(torch.full((3,), 0.021), other, truth)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the benchmark itself runs")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 1
    assert "GPU: not measured" in capsys.readouterr().err
