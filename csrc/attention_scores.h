// What attention_scores hands from its binding to its kernels: plain pointers and strides, no torch.
#pragma once

#include <cstdint>

#include "common.h"
#include "scratch.h"

namespace sparsify {

// A tensor [B, H, L, D], strides in elements. An absent one has no data.
struct Heads {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 0;
};

// A tensor [B, L], strides in elements. An absent one has no data.
struct Table {
  const void* data = nullptr;
  int64_t batch = 0, column = 0;
};

struct AttentionInputs {
  Heads q, k, v;
  Table key_bias;                // in the accumulation dtype
  Table query_valid, key_valid;  // bool
  int64_t samples, heads, queries, keys, dim, value_dim;
  double scale;
};

// Outputs are contiguous.
struct AttentionForward {
  AttentionInputs in;
  int64_t slabs;   // parts that the queries of a head are split into, from the shape alone
  void* received;  // [B, H, slabs, keys]: sums over the queries of a slab, to be added up in order
  void* output;    // [B, H, queries, value_dim]
  void* lse;       // [B, H, queries]
};

struct AttentionBackward {
  AttentionInputs in;
  Table grad_received;  // in the accumulation dtype
  Heads grad_output;
  Heads lse;                       // its rows are scalars
  void *dq, *dk, *dv, *dkey_bias;  // null where not wanted; dkey_bias [B, H, keys], to be added up over heads
};

// For items begin..end.
struct AttentionKernels {
  void (*forward)(const AttentionForward&, int64_t begin, int64_t end);
  void (*backward)(const AttentionBackward&, int64_t begin, int64_t end);
};

// For bf16 where the machine multiplies pairs of it, unless SPARSIFY_ISA rules that out; else null.
const AttentionKernels* bf16_attention();

}  // namespace sparsify
