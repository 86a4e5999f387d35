// What the CPU kernels share: the instruction set chosen at run time, and copies that know bytes, not types.
// Free of torch; the bindings (one .cpp an op) add the tensors.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace sparsify {

enum class Isa { base, avx2, avx512 };

inline const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "base";
  }
}

inline Isa detected_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return Isa::avx2;
  }
#endif
  return Isa::base;
}

// The instruction set in use: the best that the machine has, or a lesser one that SPARSIFY_ISA names (tests do).
inline Isa active_isa() {
  static const Isa isa = [] {
    const Isa best = detected_isa();
    const char* wanted = std::getenv("SPARSIFY_ISA");
    if (wanted != nullptr) {
      for (Isa candidate : {Isa::base, Isa::avx2, Isa::avx512}) {
        if (candidate <= best && std::strcmp(wanted, isa_name(candidate)) == 0) {
          return candidate;
        }
      }
    }
    return best;
  }();
  return isa;
}

template <class T>
inline void copy_strided(char* to, const char* from, int64_t count, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(to + i * static_cast<int64_t>(sizeof(T)), from + i * stride * static_cast<int64_t>(sizeof(T)),
                sizeof(T));
  }
}

struct Wide {
  uint64_t words[2];
};

// `count` elements of `size` bytes, `stride` elements apart, to a contiguous row.
inline void copy_row(char* to, const char* from, int64_t count, int64_t stride, int64_t size) {
  if (stride == 1 || count == 1) {
    std::memcpy(to, from, static_cast<size_t>(count * size));
    return;
  }
  switch (size) {
    case 1:
      return copy_strided<uint8_t>(to, from, count, stride);
    case 2:
      return copy_strided<uint16_t>(to, from, count, stride);
    case 4:
      return copy_strided<uint32_t>(to, from, count, stride);
    case 8:
      return copy_strided<uint64_t>(to, from, count, stride);
    case 16:
      return copy_strided<Wide>(to, from, count, stride);
    default:
      for (int64_t i = 0; i < count; ++i) {
        std::memcpy(to + i * size, from + i * stride * size, static_cast<size_t>(size));
      }
  }
}

}  // namespace sparsify

#if defined(TORCH_STABLE_ONLY)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace sparsify {

using torch::stable::Tensor;
using Library = torch::stable::detail::StableLibrary;  // what STABLE_TORCH_LIBRARY_IMPL hands to its body

// Work items for one thread, so that it moves or computes at least `bytes`.
inline int64_t grain(int64_t bytes_per_item, int64_t bytes = 1 << 15) {
  return bytes_per_item >= bytes ? 1 : bytes / (bytes_per_item > 0 ? bytes_per_item : 1);
}

void register_random_mask(Library& library);
void register_attention_scores(Library& library);

}  // namespace sparsify

#endif
