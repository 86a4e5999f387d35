"""Batched, sparse token operations for PyTorch: Triton on GPUs, C++ on CPUs, plain PyTorch anywhere.

>>> import torch
>>> from sparsify_kernels import random_mask
>>> random_mask(torch.zeros(2, 64, 3072, dtype=torch.uint8), keep=0.25, seed=7).tokens.shape
torch.Size([2, 16, 3072])
"""

from __future__ import annotations

from sparsify_kernels._backends import backend_info, load_extension
from sparsify_kernels.attention_scores.op import AttentionScores, attention_scores
from sparsify_kernels.key_tokens.op import KeyTokens, gather_tokens, key_tokens
from sparsify_kernels.merge_tokens.op import MergedTokens, merge_tokens
from sparsify_kernels.random_mask.op import RandomMask, random_mask
from sparsify_kernels.window_attention.op import Windows, window_attention

__all__ = [
    "AttentionScores",
    "KeyTokens",
    "MergedTokens",
    "RandomMask",
    "Windows",
    "attention_scores",
    "backend_info",
    "gather_tokens",
    "key_tokens",
    "merge_tokens",
    "random_mask",
    "window_attention",
]

__version__ = "0.1.0"

load_extension()
