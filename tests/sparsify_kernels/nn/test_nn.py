"""The modules of sparsify_kernels.nn: every sentence of their contract."""

# ruff: noqa: E501 - a table has one case a line

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from sparsify_kernels import attention_scores, gather_tokens, key_tokens, merge_tokens, random_mask
from sparsify_kernels.nn import AdaptiveSparseMerging, SparseMasking, SparseTokens, unmerge
from sparsify_kernels.testing import assert_alone, assert_compiles, assert_same, compiled_anew

# Tokens 0, 1, 2 look one way, 3, 4, 5 another; 2 and 3 are the longest and receive the most.
X = torch.tensor([[[1.0, 0], [2, 0], [8, 0], [0, 9], [0, 2], [0, 1]]])


def test_masking_is_random_mask() -> None:
    x = torch.randn(2, 16, 3)
    got = SparseMasking(keep=0.25)(x, seed=5)
    want = random_mask(x, 0.25, seed=5)
    assert isinstance(got, SparseTokens)
    assert_same(got.tokens, want.tokens)
    assert_same(got.position, want.index)
    assert_same(got.size, torch.ones(2, 4))
    assert_same(got.valid, torch.ones(2, 4, dtype=torch.bool))
    assert got.scores is None


def test_masking_assigns_kept_tokens_to_their_slots() -> None:
    x = torch.randn(2, 16, 3)
    got = SparseMasking()(x, seed=5)
    assert got.assign.dtype == torch.int64
    assert (got.assign >= 0).sum(1).tolist() == [8, 8]
    assert_same(got.assign.gather(1, got.position), torch.arange(8).expand(2, 8))
    there = torch.zeros(2, 16, dtype=torch.bool).scatter(1, got.position, True)
    assert_same(unmerge(got.tokens, got.assign), torch.where(there[..., None], x, 0.0))


def test_masking_passes_positions_through() -> None:
    position = torch.randint(0, 1000, (2, 16))
    got = SparseMasking()(torch.randn(2, 16, 3), seed=5, position=position)
    assert_same(got.position, position.gather(1, random_mask(torch.zeros(2, 16, 1), seed=5).index))


def test_masking_stratified_with_a_grid() -> None:
    module = SparseMasking(keep=0.5, grid=(4, 4), stratified=True)
    got = module(torch.randn(2, 16, 3), seed=torch.tensor([1, 2]))
    blocks = (got.position // 8) * 2 + got.position % 4 // 2
    assert all(torch.bincount(row, minlength=4).tolist() == [2] * 4 for row in blocks)
    assert "grid=(4, 4)" in repr(module)


def test_masking_any_dtype() -> None:
    got = SparseMasking()(torch.randint(0, 255, (2, 16, 3), dtype=torch.uint8), seed=5)
    assert got.tokens.dtype == torch.uint8
    assert got.size.dtype == torch.float32


def test_masking_errors() -> None:
    with pytest.raises(TypeError, match=r"^SparseMasking: position must be int64 \[B, N\], got int32 \[2, 16\]$"):
        SparseMasking()(torch.zeros(2, 16, 3), seed=5, position=torch.zeros(2, 16, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^SparseMasking: position must be int64 \[B, N\] with N = 16"):
        SparseMasking()(torch.zeros(2, 16, 3), seed=5, position=torch.zeros(2, 15, dtype=torch.int64))


def test_merging_literally() -> None:
    got = AdaptiveSparseMerging(capacity=2)(X)
    assert isinstance(got, SparseTokens)
    # The first quartile of six tokens has two: 2 and 3. The tokens beside them join them.
    assert got.position.tolist() == [[2, 3]]
    assert got.assign.tolist() == [[0, 0, 0, 1, 1, 1]]
    assert got.size.tolist() == [[3, 3]]
    torch.testing.assert_close(got.tokens, torch.tensor([[[11 / 3, 0], [0, 4]]]))
    assert got.valid.tolist() == [[True, True]]
    torch.testing.assert_close(got.scores.sum(1), torch.ones(1))


def test_merging_is_the_three_ops() -> None:
    x, context = torch.randn(2, 20, 8), torch.randn(2, 7, 8)
    size, position = torch.rand(2, 20) + 0.5, torch.randint(0, 99, (2, 20))
    valid, context_valid = torch.rand(2, 20) < 0.8, torch.rand(2, 7) < 0.8
    got = AdaptiveSparseMerging(heads=2, fence=0.5, capacity=3)(
        x, context, size=size, position=position, valid=valid, context_valid=context_valid
    )

    def heads(t: torch.Tensor) -> torch.Tensor:
        return torch.stack((t[..., :4], t[..., 4:]), dim=1)

    scores = attention_scores(
        heads(context), heads(x), key_bias=size.log(), query_valid=context_valid, key_valid=valid
    ).received
    keys = key_tokens(scores, fence=0.5, capacity=3, valid=valid)
    merged = merge_tokens(x, x, keys, weight=size, valid=valid)
    want = SparseTokens(
        merged.tokens, merged.size, gather_tokens(position, keys.index), keys.valid, merged.assign, scores
    )
    assert_same(got, want)


def test_types_and_shapes() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = AdaptiveSparseMerging()(torch.randn(2, 100, 16, dtype=dtype))
        assert got.tokens.dtype == dtype
        assert (got.tokens.shape, got.position.shape, got.assign.shape) == ((2, 25, 16), (2, 25), (2, 100))
        assert got.size.dtype == got.scores.dtype == torch.float32
        assert got.position.dtype == got.assign.dtype == torch.int64
        assert got.valid.dtype == torch.bool
        assert got.valid.all()  # distinct scores: the upper quartile fills its slots


def test_positions_default_to_arange_and_are_the_keys_own() -> None:
    x = torch.randn(2, 20, 8)
    got = AdaptiveSparseMerging()(x)
    keys = key_tokens(got.scores)
    assert_same(got.position, keys.index)
    moved = AdaptiveSparseMerging()(x, position=torch.arange(100, 120).expand(2, 20))
    assert_same(moved.position, keys.index + 100)


def test_unused_slots() -> None:
    x = torch.randn(2, 20, 8)
    valid = torch.zeros(2, 20, dtype=torch.bool)
    valid[0, 3] = True
    got = AdaptiveSparseMerging()(x, valid=valid)
    assert got.valid.tolist() == [[True] + [False] * 4, [False] * 5]
    assert got.position.tolist() == [[3, 0, 0, 0, 0], [0] * 5]
    assert got.size.tolist() == [[1, 0, 0, 0, 0], [0] * 5]
    assert_same(got.tokens[0, 0], x[0, 3])
    assert got.tokens[0, 1:].eq(0).all()
    assert got.tokens[1].eq(0).all()
    assert (got.assign >= 0).sum() == 1


def test_the_parts_without_parameters_have_none() -> None:
    assert list(AdaptiveSparseMerging().parameters()) == []
    assert list(SparseMasking().parameters()) == []


def test_learnt_projections() -> None:
    module = AdaptiveSparseMerging(dim=8, context_dim=6, heads=2)
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {
        "query.weight": (8, 6),
        "query.bias": (8,),
        "key.weight": (8, 8),
        "key.bias": (8,),
    }
    x, context = torch.randn(2, 20, 8), torch.randn(2, 7, 6)
    got = module(x, context)
    key, query = module.key(x), module.query(context)
    scores = attention_scores(query.unflatten(-1, (2, 4)).transpose(1, 2), key.unflatten(-1, (2, 4)).transpose(1, 2))
    assert_same(got.scores, scores.received)
    keys = key_tokens(got.scores)
    assert_same(got.tokens, merge_tokens(x, key, keys).tokens)  # tokens of x, similar by the projected keys
    got.scores[:, 0].sum().backward()
    for name, p in module.named_parameters():
        assert name == "key.bias" or p.grad.abs().sum() > 0  # a shift common to all keys changes no softmax


def test_no_context_means_self_attention() -> None:
    x, valid = torch.randn(2, 20, 8), torch.rand(2, 20) < 0.7
    assert_same(
        AdaptiveSparseMerging()(x, valid=valid), AdaptiveSparseMerging()(x, x, valid=valid, context_valid=valid)
    )


def test_scores_come_from_the_context() -> None:
    x = torch.eye(8)[None]
    context = torch.tensor([0.0, 0, 0, 0, 0, 50, 0, 0]).expand(1, 3, 8)
    got = AdaptiveSparseMerging(capacity=1)(x, context)
    assert got.position.tolist() == [[5]]


def test_size_weighs_attention_and_mean() -> None:
    x = torch.tensor([[[1.0], [1], [1]]])
    got = AdaptiveSparseMerging(capacity=1)(x, size=torch.tensor([[1.0, 2, 1]]))
    torch.testing.assert_close(got.scores, torch.tensor([[0.25, 0.5, 0.25]]))
    assert got.position.tolist() == [[1]]
    assert got.size.tolist() == [[4]]
    x = torch.tensor([[[1.0, 1], [1, 5]]])
    got = AdaptiveSparseMerging()(x, size=torch.tensor([[3.0, 1]]))
    torch.testing.assert_close(got.tokens, torch.tensor([[[1.0, 2]]]))


def test_merging_what_was_merged_is_the_mean_of_the_originals() -> None:
    x = torch.randn(2, 100, 8)
    first = AdaptiveSparseMerging()(x)
    second = AdaptiveSparseMerging()(first.tokens, size=first.size, position=first.position, valid=first.valid)
    assert second.tokens.shape == (2, 7, 8)
    torch.testing.assert_close((second.tokens * second.size[..., None]).sum(1), x.sum(1))
    assign = gather_tokens(second.assign, first.assign)
    for b in range(2):
        for j in range(7):
            torch.testing.assert_close(second.tokens[b, j], x[b][assign[b] == j].mean(0))
        assert set(second.position[b].tolist()) <= set(first.position[b].tolist())


def test_a_slot_of_size_zero_receives_nothing_and_harms_no_gradient() -> None:
    x = torch.randn(1, 6, 4, requires_grad=True)
    size = torch.tensor([[1.0, 2, 0, 1, 0, 1]], requires_grad=True)
    valid = torch.tensor([[True, True, True, True, False, True]])
    got = AdaptiveSparseMerging()(x, size=size, valid=valid)
    assert got.scores[0, [2, 4]].tolist() == [0, 0]
    (got.scores.square().sum() + got.tokens.square().sum()).backward()
    assert x.grad.isfinite().all()
    assert size.grad.isfinite().all()


def test_nan_at_invalid_tokens_reaches_nothing() -> None:
    module = AdaptiveSparseMerging(dim=8, heads=2)
    clean = {"x": torch.randn(3, 20, 8), "size": torch.rand(3, 20) + 0.5, "valid": torch.rand(3, 20) < 0.6}
    clean["valid"][1] = False
    bad = {
        n: t.masked_fill(~clean["valid"].unflatten(1, (-1, *[1] * (t.dim() - 2))), math.nan) if n != "valid" else t
        for n, t in clean.items()
    }
    assert bad["x"].isnan().any()
    assert_same(module(**bad), module(**clean))
    assert module(**bad).tokens[1].eq(0).all()


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    inputs = {"x": torch.randn(3, 30, 8), "context": torch.randn(3, 9, 8), "valid": torch.rand(3, 30) < 0.8}
    assert_alone(AdaptiveSparseMerging(heads=2), inputs)


def test_switched_off() -> None:
    x = torch.randn(2, 20, 8, requires_grad=True)
    module = AdaptiveSparseMerging(enabled=False)
    got = module(x, torch.randn(2, 7, 8))
    assert got.tokens is x
    assert_same(got.size, torch.ones(2, 20))
    assert_same(got.position, torch.arange(20).expand(2, 20))
    assert_same(got.assign, torch.arange(20).expand(2, 20))
    assert got.valid.all()
    assert got.valid.shape == (2, 20)
    assert got.scores is None
    assert_same(unmerge(got.tokens, got.assign), x)
    given = {"size": torch.rand(2, 20), "position": torch.randint(0, 9, (2, 20)), "valid": torch.rand(2, 20) < 0.5}
    passed = module(x, **given)
    assert all(torch.equal(getattr(passed, n), t) for n, t in given.items())
    module.enabled = True
    assert module(x).tokens.shape == (2, 5, 8)


def test_unmerge_is_the_way_back() -> None:
    x = torch.randn(2, 20, 8)
    got = AdaptiveSparseMerging()(x)
    dense = unmerge(got.tokens, got.assign)
    assert dense.shape == x.shape
    for b in range(2):
        for i in range(20):
            assert_same(dense[b, i], got.tokens[b, got.assign[b, i]])
    again = merge_tokens(dense, x, key_tokens(got.scores))  # the same clusters: the mean of equal tokens
    torch.testing.assert_close(again.tokens, got.tokens)


def test_unmerge_gives_zeros_at_minus_one_and_sums_gradients() -> None:
    tokens = torch.tensor([[[1.0], [4.0]]], requires_grad=True)
    dense = unmerge(tokens, torch.tensor([[0, 1, 1, -1]]))
    assert dense[0, :, 0].tolist() == [1, 4, 4, 0]
    dense.backward(torch.tensor([1.0, 10, 100, 1000]).view(1, 4, 1))
    assert tokens.grad[0, :, 0].tolist() == [1, 110]


def test_empty_batch_and_no_tokens() -> None:
    got = AdaptiveSparseMerging()(torch.zeros(0, 20, 8))
    assert got.tokens.shape == (0, 5, 8)
    got = AdaptiveSparseMerging()(torch.zeros(2, 0, 8), torch.zeros(2, 3, 8))
    assert got.tokens.shape == (2, 1, 8)
    assert not got.valid.any()


def test_autocast_keeps_the_dtype_of_the_tokens() -> None:
    module = AdaptiveSparseMerging(dim=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(torch.randn(2, 20, 8))
    assert (got.tokens.dtype, got.size.dtype, got.scores.dtype) == (torch.float32,) * 3


@pytest.mark.parametrize(
    ("dynamic", "backend"), [(True, "aot_eager"), pytest.param(False, "inductor", marks=pytest.mark.slow)]
)
def test_compiles_without_graph_breaks(dynamic: bool, backend: str) -> None:
    masking, merging = SparseMasking(), AdaptiveSparseMerging(heads=2, fence=0.5)

    def both(x: torch.Tensor, valid: torch.Tensor) -> tuple[Any, ...]:
        kept = masking(x, seed=3)
        got = merging(kept.tokens, size=kept.size, position=kept.position, valid=valid)
        return *got, unmerge(got.tokens, got.assign)

    x = torch.randn(2, 40, 8, requires_grad=True)
    assert_compiles(both, x, torch.rand(2, 20) < 0.7, dynamic=dynamic, backend=backend)
    off = AdaptiveSparseMerging(enabled=False)
    assert_compiles(lambda t: off(t * 1.0), x, dynamic=dynamic, backend=backend)


MODULE_ERRORS = [
    ({"heads": 0}, "heads must be >= 1, got 0"),
    ({"context_dim": 4}, "context_dim must be None without dim, got 4"),
    ({"dim": 6, "heads": 4}, "dim must be a multiple of heads = 4, got 6"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), MODULE_ERRORS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_constructor_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        AdaptiveSparseMerging(**arguments)
    assert str(caught.value) == f"AdaptiveSparseMerging: {message}"


FLOATS = "float32 or bfloat16 or float16 or float64"
ERRORS = [
    ({}, TypeError, {"x": torch.zeros(2, 6, 8).long()}, f"x must be {FLOATS} [B, N, D], got int64 [2, 6, 8]"),
    ({}, ValueError, {"x": torch.zeros(6, 8)}, f"x must be {FLOATS} [B, N, D], got float32 [6, 8]"),
    ({"dim": 4}, ValueError, {}, f"x must be {FLOATS} [B, N, 4], got float32 [2, 6, 8]"),
    ({"heads": 3}, ValueError, {}, "x's width must be a multiple of heads = 3, got 8"),
    ({}, ValueError, {"context": torch.zeros(2, 5, 7)}, f"context must be {FLOATS} [B, M, D] with D = 8, got float32 [2, 5, 7]"),
    ({"dim": 8, "context_dim": 4}, ValueError, {"context": torch.zeros(2, 5, 8)}, f"context must be {FLOATS} [B, M, 4], got float32 [2, 5, 8]"),
    ({"dim": 8, "context_dim": 4}, ValueError, {}, "context must be given: queries are projected from width 4, got None"),
    ({}, ValueError, {"context": torch.zeros(5, 8)}, f"context must be {FLOATS} [B, M, D], got float32 [5, 8]"),
    ({}, TypeError, {"context": torch.zeros(2, 5, 8).long()}, f"context must be {FLOATS} [B, M, D], got int64 [2, 5, 8]"),
    ({}, ValueError, {"context": torch.zeros(2, 5, 8, device="meta")}, "context must be on cpu like x, got meta"),
    ({}, ValueError, {"size": torch.zeros(2, 6, device="meta")}, "size must be on cpu like x, got meta"),
    ({}, ValueError, {"position": torch.zeros(2, 5).long()}, "position must be int64 [B, N] with N = 6, got int64 [2, 5]"),
    ({}, ValueError, {"valid": torch.zeros(2, 5).bool()}, "valid must be bool [B, N] with N = 6, got bool [2, 5]"),
    ({}, ValueError, {"size": torch.zeros(2, 5)}, f"size must be {FLOATS} [B, N] with N = 6, got float32 [2, 5]"),
    ({}, TypeError, {"size": torch.ones(2, 6).long()}, f"size must be {FLOATS} [B, N], got int64 [2, 6]"),
    ({}, TypeError, {"position": torch.zeros(2, 6)}, "position must be int64 [B, N], got float32 [2, 6]"),
    ({}, TypeError, {"valid": torch.zeros(2, 6)}, "valid must be bool [B, N], got float32 [2, 6]"),
    ({}, ValueError, {"context_valid": torch.zeros(2, 6).bool()}, "context_valid must be None without a context, got bool [2, 6]"),
    ({}, ValueError, {"context": torch.zeros(2, 5, 8), "context_valid": torch.zeros(2, 6).bool()}, "context_valid must be bool [B, M] with M = 5, got bool [2, 6]"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "error", "changes", "message"), ERRORS, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("enabled", [True, False])
def test_errors_name_the_argument(
    module: dict[str, Any],
    error: type[Exception],
    changes: dict[str, Any],
    message: str,
    enabled: bool,
    compiled: bool,
) -> None:
    merging = AdaptiveSparseMerging(**module, enabled=enabled)
    call = compiled_anew(merging) if compiled else merging
    with pytest.raises(error) as caught:
        call(**{"x": torch.zeros(2, 6, 8), **changes})
    assert str(caught.value) == f"AdaptiveSparseMerging: {message}"


def test_unmerge_errors() -> None:
    with pytest.raises(ValueError, match=r"^unmerge: tokens must be \[B, K, D\], got float32 \[2, 3\]$"):
        unmerge(torch.zeros(2, 3), torch.zeros(2, 5).long())
    with pytest.raises(TypeError, match=r"^unmerge: assign must be int64 \[B, N\], got float32 \[2, 5\]$"):
        unmerge(torch.zeros(2, 3, 4), torch.zeros(2, 5))


def test_a_negative_size_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"^merge_tokens: weight must be finite and >= 0 at valid tokens, got -1.0 at \[0, 2\]"
    ):
        AdaptiveSparseMerging()(torch.randn(1, 5, 2), size=torch.tensor([[1.0, 1, -1, 1, 1]]))


def test_needs_torch_only() -> None:
    script = (
        "import sys\n"
        "for name in ('timm', 'transformers', 'av', 'torchvision', 'accelerate', 'rich', 'PIL'):\n"
        "    sys.modules[name] = None\n"  # importing one of them fails
        "import torch, sparsify_kernels.nn as nn\n"
        "out = nn.AdaptiveSparseMerging()(nn.SparseMasking()(torch.randn(2, 16, 4), seed=1).tokens)\n"
        "assert out.tokens.shape == (2, 2, 4)\n"
        "assert 'sparsify' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
