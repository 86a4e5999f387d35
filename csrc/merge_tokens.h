// What merge_tokens hands from its binding to its kernels: plain pointers and strides, no torch.
#pragma once

#include <cstdint>

#include "common.h"

namespace sparsify {

// Which of a sample's `keys` each of its `token`s is most similar to, by `metric` [N, dim].
struct AssignJob {
  Float dtype;
  const void* metric;
  int64_t row_stride, dim;
  const int64_t* keys;
  int64_t count;  // of keys
  const int64_t* token;
  int64_t tokens;   // how many to assign
  int64_t tile;     // keys at a time, a multiple of a panel
  int64_t* assign;  // [N]
};

// grad and mean [B, slots, dim], x [B, tokens, dim]; no grad, no grad_size, no weight: null. dx or dweight that nobody
// wants: null. Without x there is no way from the mean to dweight, as the caller sees to.
struct GradientJob {
  Float dtype;
  Rows grad, x, mean;
  int64_t dim, tokens, slots;
  const void* grad_size;
  const void* weight;
  const void* size;
  const int64_t* assign;
  void* dx;
  void* dweight;
  bool streamed;  // dx is written past the caches: whole lines of 64 bytes
};

struct MergeKernels {
  void (*assign)(const AssignJob&, void* keys, void* rows, float* best);
  void (*gradients)(const GradientJob&, int64_t begin, int64_t end);
  int64_t block;  // rows that are multiplied at a time
  int64_t panel;  // by so many keys
};

// bf16 of at least 32 values, multiplied without widening; no row of those assigned, nor of their keys, has small
// values.
struct Bf16Kernels {
  bool (*has_small_values)(const Bf16* row, int64_t dim);
  void (*assign)(const AssignJob&, void* keys, void* rows, float* best);
};

// Tiles of AMX, else the pairs of AVX-512, else null. SPARSIFY_ISA=avx512_bf16 leaves out tiles, any lesser one both.
const Bf16Kernels* bf16_kernels();

}  // namespace sparsify
