// What window_attention hands from its binding to its kernels: plain pointers and strides, no torch.
#pragma once

#include <cstdint>

#include "common.h"
#include "scratch.h"

namespace sparsify {

// Rows of packed tokens, [N, 3, H, d] or [N, H, d]; strides in elements, the last is 1.
struct TokenRows {
  const void* data = nullptr;
  int64_t token = 0, part = 0, head = 0;
};

// Everything but qkv is dense; bias and scale are in the accumulation dtype.
struct WindowInputs {
  TokenRows qkv;
  const void* bias;   // [H, 2 * height - 1, 2 * width - 1]
  const void* scale;  // [H] or null
  const int64_t *member, *start, *place;
  const int64_t* region;  // or null
  int64_t tokens, windows, heads, dim, height, width;
  int64_t most;   // tokens in the largest window
  int64_t slabs;  // parts that the windows are split into, from the shapes alone
  bool cosine;

  int64_t columns() const {
    return 2 * width - 1;
  }
  int64_t table() const {
    return (2 * height - 1) * columns();
  }
  int64_t slab_begin(int64_t slab) const {
    return windows * slab / slabs;
  }
};

// An item of work is a slab of windows in one head: item = slab * H + head. Outputs are dense.
struct WindowForward {
  WindowInputs in;
  void* output;  // [N, H, d]
  void* lse;     // [N, H]
};

struct WindowBackward {
  WindowInputs in;
  TokenRows grad;
  const void* lse;  // [N, H]
  void* dqkv;       // [N, 3, H, d]; this and the others null where not wanted
  void* dbias;      // [slabs, H, rows, columns], to be added up over slabs
  double* dscale;   // [slabs, H], likewise
};

}  // namespace sparsify
