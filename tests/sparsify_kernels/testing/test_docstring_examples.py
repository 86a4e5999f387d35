"""The examples in the docstrings of the public functions run and print what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = [
    "sparsify_kernels",
    "sparsify_kernels.attention_scores.op",
    "sparsify_kernels.key_tokens.op",
    "sparsify_kernels.merge_tokens.op",
    "sparsify_kernels.nn",
    "sparsify_kernels.random_mask.op",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
