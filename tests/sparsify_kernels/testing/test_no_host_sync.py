"""With value checks off, as on a GPU, no reference asks a tensor for its value.

They run here on fake tensors, which have none: ``item()``, ``nonzero()``, a branch on a tensor or a size read from
data raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sparsify_kernels.attention_scores import reference as attention
from sparsify_kernels.key_tokens import reference as keys
from sparsify_kernels.merge_tokens import reference as merge
from sparsify_kernels.random_mask import reference as random
from sparsify_kernels.testing import (
    AttentionShape,
    KeyShape,
    MergeShape,
    WindowShape,
    attention_inputs,
    merge_inputs,
    score_inputs,
    window_inputs,
)
from sparsify_kernels.window_attention import reference as window


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (keys, merge, random, window):
        monkeypatch.setattr(module, "check_values", lambda device: False)


def on_fakes(function: Callable[..., Any], *args: Any) -> Any:
    with FakeTensorMode() as mode:
        return function(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))


def test_attention_scores() -> None:
    inputs = attention_inputs(AttentionShape(3, 2, 5, 7, 4, 6), bias=True, valid=True)
    args = [inputs[n] for n in ("q", "k", "v", "key_bias", "query_valid", "key_valid")]
    received, output, lse = attention.attention_scores(*args, None)
    assert on_fakes(attention.attention_scores, *args, None)[0].shape == received.shape
    wanted = [True] * 4
    grads = on_fakes(attention.attention_scores_backward, received, output, *args, output, lse, None, wanted)
    assert [g.shape for g in grads] == [t.shape for t in args[:4]]


@pytest.mark.parametrize("width", [0, 4])
def test_random_mask(width: int) -> None:
    x, seed = torch.rand(3, 8, 5), torch.tensor([3, 4, 5])
    tokens, index = on_fakes(random.random_mask, x, seed, 4, width)
    assert (tokens.shape, index.shape) == ((3, 4, 5), (3, 4))
    assert on_fakes(random.random_mask_backward, x[:, :4], torch.arange(4).expand(3, -1), 8).shape == (3, 8, 5)


def test_key_tokens_and_gather_tokens() -> None:
    inputs = score_inputs(KeyShape(3, 41), valid=True)
    index, count = on_fakes(keys.key_tokens, inputs["scores"], inputs["valid"], 1.5, None)
    assert (index.shape, count.shape) == ((3, 11), (3,))
    x, slots = torch.randn(3, 41, 5), torch.zeros(3, 11, dtype=torch.int64)
    assert on_fakes(keys.key_tokens_gather, x, slots).shape == (3, 11, 5)
    assert on_fakes(keys.key_tokens_gather_backward, x[:, :11], slots, 41).shape == (3, 41, 5)


def test_merge_tokens() -> None:
    inputs = merge_inputs(MergeShape(3, 23, 5, 6, 4), weight=True, valid=True)
    out = merge.merge_tokens(inputs["x"], inputs["metric"], *inputs["keys"], inputs["weight"], inputs["valid"])
    fake = on_fakes(
        merge.merge_tokens, inputs["x"], inputs["metric"], *inputs["keys"], inputs["weight"], inputs["valid"]
    )
    assert [t.shape for t in fake] == [t.shape for t in out]
    args = (out[0], out[1], inputs["x"], inputs["weight"], *out, [True, True])
    assert on_fakes(merge.merge_tokens_backward, *args)[1].shape == (3, 23)


def test_a_host_sync_would_be_seen() -> None:
    with pytest.raises(DataDependentOutputException):
        on_fakes(lambda x: x.sum().item(), torch.ones(3))


def test_window_attention() -> None:
    inputs = window_inputs(WindowShape(11, 3, 2, 3, 2, 4), scale=True, region=True)
    args = [inputs["qkv"], inputs["bias"], inputs["scale"], *inputs["windows"]]
    output, lse = window.window_attention(*args, True)
    assert on_fakes(window.window_attention, *args, True)[0].shape == output.shape
    grads = on_fakes(window.window_attention_backward, output, *args, lse, True, [True] * 3)
    assert [g.shape for g in grads] == [t.shape for t in args[:3]]
