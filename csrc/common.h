// What the CPU kernels share: the instruction set chosen at run time, and copies that know bytes, not types.
// Free of torch; the bindings (one .cpp an op) add the tensors.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

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

#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 10
#define SPARSIFY_PAIRS  // the compiler knows AVX-512's dot products of pairs of bf16
#endif

// The units for bf16 that SPARSIFY_ISA leaves in use, where the machine has them: every one if it is not set, pairs
// alone if it says avx512_bf16, else none.
enum class Bf16Units { none, pairs, all };

inline Bf16Units allowed_bf16_units() {
  const char* wanted = std::getenv("SPARSIFY_ISA");
  if (active_isa() != Isa::avx512) {
    return Bf16Units::none;
  }
  if (wanted == nullptr) {
    return Bf16Units::all;
  }
  return std::strcmp(wanted, "avx512_bf16") == 0 ? Bf16Units::pairs : Bf16Units::none;
}

// Whether the machine multiplies pairs of bf16.
inline bool has_pairs() {
#if defined(SPARSIFY_PAIRS)
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return false;
#endif
}

// Writes a line of 64 bytes, `to` being aligned to its size, past the caches. end_stream() comes before another thread
// reads it.
inline void stream_line(void* to, const void* line) {
#if defined(__SSE2__)
  for (int part = 0; part < 4; ++part) {
    _mm_stream_si128(static_cast<__m128i*>(to) + part, _mm_loadu_si128(static_cast<const __m128i*>(line) + part));
  }
#else
  std::memcpy(to, line, 64);
#endif
}

inline void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
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

// The float types that kernels compute on; the two halves are told apart by type, and widened by floats.inl.
enum class Float { f32, f64, bf16, f16 };

struct Bf16 {
  uint16_t bits;
};

struct Fp16 {
  uint16_t bits;
};

// The rows of a tensor [B, N, D], each contiguous; strides are counted in elements.
struct Rows {
  const void* data;
  int64_t sample_stride, row_stride;

  int64_t at(int64_t sample, int64_t row) const {
    return sample * sample_stride + row * row_stride;
  }
};

}  // namespace sparsify

#if defined(TORCH_STABLE_ONLY)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

namespace sparsify {

using torch::stable::Tensor;
using Library = torch::stable::detail::StableLibrary;  // what STABLE_TORCH_LIBRARY_IMPL hands to its body

// Work items for one thread, so that it moves or computes at least `bytes`.
inline int64_t grain(int64_t bytes_per_item, int64_t bytes = 1 << 15) {
  return bytes_per_item >= bytes ? 1 : bytes / (bytes_per_item > 0 ? bytes_per_item : 1);
}

inline Float float_type(const Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Float::f32;
    case ScalarType::Double:
      return Float::f64;
    case ScalarType::BFloat16:
      return Float::bf16;
    case ScalarType::Half:
      return Float::f16;
    default:
      throw std::runtime_error("sparsify_kernels: expected float32, float64, bfloat16 or float16");
  }
}

inline Tensor dense(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// Itself or a copy, so that its rows are contiguous: one way through a kernel, and the same bits for every layout.
inline Tensor with_rows(const Tensor& x) {
  return x.stride(2) == 1 || x.size(2) == 1 ? x : torch::stable::contiguous(x);
}

inline Rows rows_of(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1)};
}

void register_key_tokens(Library& library);
void register_merge_tokens(Library& library);
void register_random_mask(Library& library);
void register_attention_scores(Library& library);
void register_window_attention(Library& library);

}  // namespace sparsify

#endif
