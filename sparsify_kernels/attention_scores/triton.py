"""attention_scores in Triton: which kernels run, on what grid, in what tiles.

Widths (d and dv) up to 128 in fp32, bf16 and fp16; anything else goes to the reference, fp64 too. Nothing of size
M x N is ever stored. Deterministic: no atomics, and the order of every sum follows from the shape of one sample.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sparsify_kernels._floats_triton import INTERPRETED
from sparsify_kernels._tiles_triton import PRECISION, Tiles
from sparsify_kernels.attention_scores import reference
from sparsify_kernels.attention_scores.backward_triton import exact_row_sums, grad_keys, grad_queries, row_sums
from sparsify_kernels.attention_scores.forward_triton import attend, attend_once, receive
from sparsify_kernels.attention_scores.tiles_triton import LOG2E, over_heads, prepare

__all__ = ["TARGETS", "attention_scores", "attention_scores_backward"]

WIDEST = 128  # d and dv; beyond, the reference
PAD = 128  # the tables of keys are filled up to a multiple: no tile is wider
OVER_HEADS = {"BH": 16, "BLOCK": PAD}

# By kernel: by width (64: up to 64, 128), bytes of an element. The largest that take no more registers than there are
# on any of the GPUs that the tests compile for. BM of ``attend_once`` is the most queries that it takes.
TILES: dict[Any, dict[tuple[int, int], Tiles]] = {
    attend: {
        (64, 2): Tiles(128, 64, 8, 3),
        (128, 2): Tiles(128, 64, 8, 2),
        (64, 4): Tiles(32, 32, 8, 2),
        (128, 4): Tiles(32, 32, 8, 2),
    },
    attend_once: {
        (64, 2): Tiles(64, 64, 4, 3),
        (128, 2): Tiles(64, 32, 4, 3),
        (64, 4): Tiles(64, 32, 4, 2),
        (128, 4): Tiles(16, 32, 4, 2),
    },
    receive: {
        (64, 2): Tiles(64, 128, 4, 3),
        (128, 2): Tiles(64, 128, 8, 2),
        (64, 4): Tiles(32, 64, 4, 2),
        (128, 4): Tiles(16, 64, 8, 2),
    },
    row_sums: {
        (64, 2): Tiles(64, 64, 4, 2),
        (128, 2): Tiles(64, 64, 8, 2),
    },
    exact_row_sums: {
        (64, 4): Tiles(32, 32, 8, 1),
        (128, 4): Tiles(16, 32, 8, 1),
    },
    grad_keys: {
        (64, 2): Tiles(64, 64, 4, 2),
        (128, 2): Tiles(32, 32, 4, 2),
        (64, 4): Tiles(32, 32, 8, 1),
        (128, 4): Tiles(16, 16, 8, 1),
    },
    grad_queries: {
        (64, 2): Tiles(64, 64, 4, 2),
        (128, 2): Tiles(64, 32, 4, 2),
        (64, 4): Tiles(32, 32, 8, 1),
        (128, 4): Tiles(16, 16, 8, 1),
    },
}
# With bias or validity there is more to hold.
TILES_WITH_TERMS = {(attend, 128, 2): Tiles(64, 64, 8, 2)}


def attention_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    key_bias: Tensor | None,
    query_valid: Tensor | None,
    key_valid: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op on CUDA tensors (CPU tensors under the interpreter); arguments as ``reference.attention_scores``."""
    if not _served(q, v):
        return reference.attention_scores(q, k, v, key_bias, query_valid, key_valid, scale)
    call = _Call(q, k, v, key_bias, query_valid, key_valid, scale)
    batch, heads, queries, _ = q.shape
    received = q.new_empty((batch, call.keys), dtype=torch.float32)
    output = q.new_empty((batch, heads, queries, call.value_dim))
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    if not batch:
        return received, output, lse
    part = q.new_empty((batch, heads, call.keys), dtype=torch.float32)
    term, _ = call.prepare(None)
    inputs = (q, k, call.values, term, query_valid, output, lse)
    numbers = (*call.sizes, call.factor, *call.strides, *_strides(query_valid, 2))
    one_pass = queries <= call.tiles(attend_once).BM
    if one_pass:
        tiles = call.rows(attend_once)
        tiles |= {"BM": _block(queries), "ONE_TILE": call.keys <= tiles["BN"]}
        attend_once[(batch * heads,)](*inputs, part, *numbers, **tiles)
    else:
        tiles = call.rows(attend)
        base, inverse = torch.empty_like(lse), torch.empty_like(lse) if call.exact else None
        attend[call.grid(queries, tiles["BM"])](*inputs, base, inverse, *numbers, **tiles)
    if not call.keys:
        return received, output, lse
    if not one_pass:
        tiles = call.columns(receive)
        numbers = (*call.sizes, call.factor, *q.stride(), *k.stride())
        receive[call.grid(call.keys, tiles["BN"])](q, k, term, base, inverse, part, *numbers, **tiles)
    call.over_heads(part, received, mean=True)
    return received, output, lse


def attention_scores_backward(
    grad_received: Tensor | None,
    grad_output: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    key_bias: Tensor | None,
    query_valid: Tensor | None,
    key_valid: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward on CUDA tensors (CPU tensors under the interpreter); arguments as in the reference."""
    inputs = (q, k, v, key_bias, query_valid, key_valid)
    if not _served(q, v):
        return reference.attention_scores_backward(grad_received, grad_output, *inputs, output, lse, scale, wanted)
    call = _Call(*inputs, scale)
    dq = q.new_empty(q.shape if wanted[0] else (0,))
    dk = k.new_empty(k.shape if wanted[1] else (0,))
    dv = v.new_empty(v.shape) if wanted[2] and v is not None else q.new_empty((0,))
    dbias = lse.new_empty((call.batch, call.keys) if wanted[3] else (0,))
    asked = [x if x.numel() else None for x in (dq, dk, dv, dbias)]
    if asked == [None] * 4:
        return dq, dk, dv, dbias
    part = None if asked[3] is None else lse.new_empty((call.batch, call.heads, call.keys))
    term, gain = call.prepare(grad_received)
    grad = None if call.values is None else grad_output
    output, lse = output.contiguous(), lse.contiguous()  # as the forward left them
    sums, base, inverse = torch.empty_like(lse), torch.empty_like(lse) if call.exact else lse, None
    strides = _strides(grad, 4)
    if call.exact:
        inverse = torch.empty_like(lse)
        if call.queries:
            tiles = call.rows(exact_row_sums)
            tensors = (q, k, call.values, term, gain, grad, lse, sums, base, inverse)
            numbers = (*call.sizes, call.factor, *call.strides, *strides)
            exact_row_sums[call.grid(call.queries, tiles["BM"])](*tensors, *numbers, **tiles)
    elif call.queries:
        tiles = call.rows(row_sums)
        numbers = (*call.sizes, call.factor, *q.stride(), *k.stride(), *strides)
        tensors = (q, k, term, gain, grad, output, lse, sums)
        row_sums[call.grid(call.queries, tiles["BM"])](*tensors, *numbers, **tiles)
    tensors = (q, k, call.values, term, gain, grad, base, sums, inverse)
    numbers = (*call.sizes, call.factor, call.scale, *call.strides, *strides)
    if asked[1:] != [None] * 3:
        tiles = call.columns(grad_keys)
        grad_keys[call.grid(call.keys, tiles["BN"])](*tensors, asked[1], asked[2], part, *numbers, **tiles)
    if asked[0] is not None:
        tiles = call.rows(grad_queries)
        grad_queries[call.grid(call.queries, tiles["BM"])](*tensors, dq, *numbers, **tiles)
    if part is not None:
        call.over_heads(part, dbias, mean=False)
    return dq, dk, dv, dbias


class _Call:
    """What the launches of one call share: sizes, strides, tables of keys, tiles."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        key_bias: Tensor | None,
        query_valid: Tensor | None,
        key_valid: Tensor | None,
        scale: float | None,
    ) -> None:
        self.q = q
        self.batch, self.heads, self.queries, self.dim = q.shape
        self.keys, self.value_dim = k.shape[2], 0 if v is None else v.shape[3]
        self.values = v if self.value_dim else None
        self.key_bias, self.query_valid, self.key_valid = key_bias, query_valid, key_valid
        self.scale = self.dim**-0.5 if scale is None else scale
        self.exact = q.dtype == torch.float32
        self.factor = self.scale if self.exact else self.scale * LOG2E.value
        self.padded = triton.cdiv(self.keys, PAD) * PAD
        self.sizes = (self.heads, self.queries, self.keys, self.dim, self.value_dim, self.padded)
        self.strides = (*q.stride(), *k.stride(), *_strides(self.values, 4))

    def prepare(self, grad_received: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The tables ``term`` and ``gain``, None where every key would have 0."""
        tables = (self.key_bias, self.query_valid, self.key_valid, grad_received)
        term = gain = None
        if self.key_bias is not None or self.key_valid is not None:
            term = self.q.new_empty((self.batch, self.padded), dtype=torch.float32)
        if grad_received is not None:
            gain = self.q.new_empty((self.batch, self.padded), dtype=torch.float32)
        if self.keys and (term is not None or gain is not None):
            numbers = (self.heads, self.queries, self.keys, self.padded, *(s for t in tables for s in _strides(t, 2)))
            prepare[(self.batch * self.padded // PAD,)](*tables, term, gain, *numbers, EXACT=self.exact, BLOCK=PAD)
        return term, gain

    def over_heads(self, part: Tensor, out: Tensor, *, mean: bool) -> None:
        """``part`` [B, H, N] added up over the heads, into ``out`` [B, N]."""
        numbers = (self.heads, self.queries, self.keys, *_strides(self.query_valid, 2))
        grid = (self.batch * triton.cdiv(self.keys, OVER_HEADS["BLOCK"]),)
        over_heads[grid](part, self.query_valid, out, *numbers, MEAN=mean, **OVER_HEADS)

    def grid(self, length: int, tile: int) -> tuple[int]:
        """One program for each tile of each head."""
        return (self.batch * self.heads * triton.cdiv(length, tile),)

    def rows(self, kernel: Any) -> dict[str, Any]:
        """The launch of a kernel that goes over the keys."""
        tiles = self._launch(kernel)
        return tiles | {"EVEN_N": self.keys % tiles["BN"] == 0}

    def columns(self, kernel: Any) -> dict[str, Any]:
        """The launch of a kernel that goes over the queries."""
        tiles = self._launch(kernel)
        return tiles | {"EVEN_M": self.queries % tiles["BM"] == 0, "HAS_QUERY_VALID": self.query_valid is not None}

    def tiles(self, kernel: Any) -> Tiles:
        key = (max(64, _block(self.dim), _block(self.value_dim)), self.q.element_size())
        with_terms = self.key_bias is not None or self.key_valid is not None
        tiles = TILES_WITH_TERMS.get((kernel, *key)) if with_terms else None
        return tiles or TILES[kernel][key]

    def _launch(self, kernel: Any) -> dict[str, Any]:
        tiles = self.tiles(kernel)
        if INTERPRETED:  # small ones, so that small tests see several
            tiles = tiles._replace(BM=min(tiles.BM, 32), BN=16)
        block, value_block = _block(self.dim), _block(self.value_dim)
        even = {"EVEN_D": block == self.dim, "EVEN_DV": value_block == self.value_dim}
        precision = "ieee" if INTERPRETED else PRECISION["hip" if torch.version.hip else "cuda"]
        return tiles._asdict() | {"BD": block, "BDV": value_block, "PRECISION": precision} | even


def _served(q: Tensor, v: Tensor | None) -> bool:
    """Whether there are kernels for this dtype and these widths."""
    return q.dtype != torch.float64 and q.shape[3] <= WIDEST and (v is None or v.shape[3] <= WIDEST)


def _strides(x: Tensor | None, axes: int) -> tuple[int, ...]:
    return (0,) * axes if x is None else x.stride()


def _block(size: int) -> int:
    """What ``size`` is filled up to: matrix units take no less than 16."""
    return max(16, triton.next_power_of_2(size))


def _target(
    kernel: Any, dtype: str, width: int, *, bare: bool = False, ragged: bool = False, **changes: Any
) -> tuple[Any, str, dict[str, Any], int]:
    """How a kernel is compiled for ``width`` = d = dv: ``bare`` without bias and validity, else with all there is, on
    whole tiles or ``ragged``. Rows are aligned, their elements next to each other."""
    names = kernel.arg_names
    key = (width, 4 if dtype == "fp32" else 2)
    tiles = (None if bare else TILES_WITH_TERMS.get((kernel, *key))) or TILES[kernel][key]
    constants = {**tiles._asdict(), "BD": width, "BDV": width, "EVEN_M": not ragged, "EVEN_N": not ragged}
    constants |= {"EVEN_D": True, "EVEN_DV": True, "HAS_QUERY_VALID": not bare, "ONE_TILE": False, **changes}
    constants |= {"PRECISION": PRECISION if dtype == "fp32" else "ieee", "q_d": 1, "k_d": 1, "v_d": 1, "grad_d": 1}
    constants |= {"p_term": None, "p_query_valid": None} if bare else {}
    constants |= {} if dtype == "fp32" else {"p_inverse": None}
    warps = constants.pop("num_warps")
    constants = {n: c for n, c in constants.items() if n in names or n == "num_stages"}
    tensors = dict.fromkeys(("p_q", "p_k", "p_v", "p_out", "p_grad", "p_dq", "p_dk", "p_dv"), f"*{dtype}:16")
    types = {"p_query_valid": "*i1", "heads": "i32", "factor": "fp32", "scale": "fp32", **tensors}
    rest = (types.get(n, "*fp32:16" if n.startswith("p_") else "i32:16") for n in names if n not in constants)
    return kernel, " ".join(rest), constants, warps


# How the tests compile every kernel: types of the run-time arguments (:16 for a multiple of 16), compile-time
# arguments, warps.
TARGETS: list[tuple[Any, str, dict[str, Any], int]] = [
    *(
        _target(kernel, "bf16" if size == 2 else "fp32", width, ragged=True)
        for kernel, table in TILES.items()
        for width, size in table
    ),
    # d and dv between two blocks; fp16; as few queries or keys as one tile takes.
    *(
        _target(kernel, "fp32", 128, ragged=True, EVEN_D=False, EVEN_DV=False)
        for kernel in TILES
        if (128, 4) in TILES[kernel]
    ),
    *(
        _target(kernel, "fp16", width, ragged=True)
        for kernel, table in TILES.items()
        for width, size in table
        if size == 2
    ),
    *(
        _target(attend_once, dtype, width, ragged=True, ONE_TILE=True)
        for dtype in ("bf16", "fp32")
        for width in (64, 128)
    ),
    *(_target(attend, "bf16", width, bare=True) for width in (64, 128)),
    _target(attend_once, "bf16", 64, bare=True, ragged=True, BM=16, ONE_TILE=True),
    (
        prepare,
        "*fp32 *i1 *i1 *fp32 *fp32 *fp32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32",
        {"EXACT": False, "BLOCK": PAD},
        4,
    ),
    (over_heads, "*fp32 *i1 *fp32 i32 i32 i32 i32 i32", {"MEAN": True, **OVER_HEADS}, 4),
]
