// key_tokens on the CPU: quartiles by selection, the threshold in fp64, the keys in ascending order; and gathering by
// their index. The definition is sparsify_kernels/key_tokens/reference.py; the index is bit-identical to it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common.h"
#include "segments.h"

namespace sparsify {
namespace {

struct KeyKernels {
  bool (*order_scores)(int32_t*, Float, const char*, int64_t, const uint8_t*, int64_t);
  int64_t (*count_above)(const int32_t*, int64_t, int32_t);
  int32_t (*largest_but)(const int32_t*, int64_t, int64_t);
  int32_t (*smallest_above)(const int32_t*, int64_t, int32_t);
  void (*compact)(const int32_t*, int64_t, int32_t, int64_t, int64_t*);
};

namespace base {
#include "key_tokens.inl"
}

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "key_tokens.inl"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
namespace avx512 {
#include "key_tokens.inl"
}
#pragma GCC pop_options
#endif

const KeyKernels& pick_key_kernels() {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::avx512:
      return avx512::kKernels;
    case Isa::avx2:
      return avx2::kKernels;
    default:
      break;
  }
#endif
  return base::kKernels;
}

float from_ordered(int32_t ordered) {
  const int32_t bits = ordered ^ (ordered >> 31 & INT32_MAX);
  float score;
  std::memcpy(&score, &bits, 4);
  return score;
}

int32_t to_ordered(float score) {
  int32_t bits;
  score += 0.0f;
  std::memcpy(&bits, &score, 4);
  return bits ^ (bits >> 31 & INT32_MAX);
}

// The keys of one sample after the other; scratch for rows of `tokens` scores.
class PickKeys {
 public:
  PickKeys(int64_t tokens, int64_t slots, double fence)
      : tokens_(tokens),
        slots_(slots),
        fence_(fence),
        kernels_(pick_key_kernels()),
        row_(static_cast<size_t>(tokens)),
        valid_(static_cast<size_t>(tokens), 1),
        found_(static_cast<size_t>(tokens) + 1) {}

  // Writes `slots` of index and returns the count, or -1 if a valid score is NaN.
  int64_t operator()(Float dtype, const char* scores, int64_t stride, const char* valid, int64_t valid_stride,
                     int64_t* index) {
    if (valid != nullptr) {
      copy_row(reinterpret_cast<char*>(valid_.data()), valid, tokens_, valid_stride, 1);
    }
    if (kernels_.order_scores(row_.data(), dtype, scores, stride, valid_.data(), tokens_)) {
      return -1;
    }
    const int64_t there = valid == nullptr ? tokens_ : std::count(valid_.begin(), valid_.end(), uint8_t{1});
    const int64_t count = there > 0 ? pick(there) : 0;
    std::copy_n(found_.begin(), count, index);
    std::fill(index + count, index + slots_, int64_t{-1});
    return count;
  }

 private:
  int64_t pick(int64_t there) {
    const int32_t* row = row_.data();
    const int32_t cut = first_at_least(threshold(there));
    const int64_t candidates = kernels_.count_above(row, tokens_, cut - 1);  // cut > kNowhere: it is a score
    if (candidates >= 1 && candidates <= slots_) {
      kernels_.compact(row, tokens_, cut - 1, 0, found_.data());
      return candidates;
    }
    const int64_t count = candidates == 0 ? 1 : slots_;
    const int32_t last = kernels_.largest_but(row, tokens_, count - 1);
    kernels_.compact(row, tokens_, last, count - kernels_.count_above(row, tokens_, last), found_.data());
    return count;
  }

  // Q3 + fence * (Q3 - Q1) of `there` valid scores.
  double threshold(int64_t there) const {
    const double q3 = quartile(there, 3);
    if (!(fence_ > 0)) {
      return q3;
    }
    const double q1 = quartile(there, 1);
    const double spread = q3 == q1 ? 0.0 : q3 - q1;   // equal infinities have no spread
    const volatile double product = spread * fence_;  // rounded by itself: never part of a fused multiply-add
    return q3 + product;
  }

  // As the reference says, with its branch at one half and its rule for infinities.
  double quartile(int64_t there, int64_t quarters) const {
    const int64_t position = (there - 1) * quarters, low = position / 4, part = position % 4;
    const int64_t above = there - 1 - low;  // this many valid scores lie above rank `low` or tie with it
    const int32_t lower = kernels_.largest_but(row_.data(), tokens_, above);
    const double a = from_ordered(lower);
    if (part == 0) {
      return a;
    }
    const bool tie = kernels_.count_above(row_.data(), tokens_, lower) < above;
    const double b = tie ? a : from_ordered(kernels_.smallest_above(row_.data(), tokens_, lower));
    if (a == b || a == -std::numeric_limits<double>::infinity()) {
      return a;
    }
    if (b == std::numeric_limits<double>::infinity()) {
      return b;
    }
    // The factor is 1/4 or 1/2 and the product exact: fused or not, the bits are the same.
    return part < 2 ? a + 0.25 * (b - a) : b - (1.0 - static_cast<double>(part) / 4) * (b - a);
  }

  // The smallest score, as an ordered integer, that is at least `threshold`.
  static int32_t first_at_least(double threshold) {
    const float nearest = static_cast<float>(threshold);
    return to_ordered(nearest) + (static_cast<double>(nearest) < threshold ? 1 : 0);
  }

  int64_t tokens_, slots_;
  double fence_;
  const KeyKernels& kernels_;
  std::vector<int32_t> row_;
  std::vector<uint8_t> valid_;
  std::vector<int64_t> found_;
};

[[noreturn]] void complain_of_nan(const Tensor& scores, const std::optional<Tensor>& valid, int64_t sample) {
  const Float dtype = float_type(scores);
  const auto is_nan = [&](int64_t i) {
    const int64_t at = sample * scores.stride(0) + i * scores.stride(1);
    if (dtype == Float::f64) {
      return std::isnan(static_cast<const double*>(scores.const_data_ptr())[at]);
    }
    if (dtype == Float::f32) {
      return std::isnan(static_cast<const float*>(scores.const_data_ptr())[at]);
    }
    const int bits = static_cast<const uint16_t*>(scores.const_data_ptr())[at] & 0x7FFF;
    return bits > (dtype == Float::bf16 ? 0x7F80 : 0x7C00);
  };
  const bool* there = valid ? static_cast<const bool*>(valid->const_data_ptr()) : nullptr;
  for (int64_t i = 0; i < scores.size(1); ++i) {
    if ((there == nullptr || there[sample * valid->stride(0) + i * valid->stride(1)]) && is_nan(i)) {
      throw std::runtime_error("key_tokens: scores must not be NaN at valid tokens, got NaN at [" +
                               std::to_string(sample) + ", " + std::to_string(i) + "]");
    }
  }
  throw std::logic_error("key_tokens: no NaN where one was seen");
}

// scores [B, N], valid bool [B, N] -> index int64 [B, K], count int64 [B].
std::tuple<Tensor, Tensor> key_tokens(const Tensor& scores, const std::optional<Tensor>& valid, double fence,
                                      std::optional<int64_t> capacity) {
  const int64_t samples = scores.size(0), tokens = scores.size(1);
  const int64_t quartile = std::max<int64_t>(1, tokens - 3 * tokens / 4);
  const int64_t slots = std::min(quartile, capacity.value_or(quartile));
  if (slots < 1 || (valid && (valid->dim() != 2 || valid->size(0) != samples || valid->size(1) != tokens))) {
    throw std::runtime_error("key_tokens: capacity must be >= 1, and valid [B, N] like scores [B, N]");
  }
  constexpr auto kLong = torch::headeronly::ScalarType::Long;
  Tensor index = torch::stable::new_empty(scores, {samples, slots}, kLong);
  Tensor count = torch::stable::new_empty(scores, {samples}, kLong);
  const Float dtype = float_type(scores);
  const int64_t bytes = static_cast<int64_t>(scores.element_size());
  const char* from = static_cast<const char*>(scores.const_data_ptr());
  const char* there = valid ? static_cast<const char*>(valid->const_data_ptr()) : nullptr;
  const int64_t sample_stride = scores.stride(0) * bytes, stride = scores.stride(1);
  const int64_t valid_sample = valid ? valid->stride(0) : 0, valid_stride = valid ? valid->stride(1) : 0;
  int64_t* keys = static_cast<int64_t*>(index.mutable_data_ptr());
  int64_t* counts = static_cast<int64_t*>(count.mutable_data_ptr());

  torch::stable::parallel_for(0, samples, grain(32 * tokens), [&](int64_t begin, int64_t end) {
    PickKeys pick(tokens, slots, fence);
    for (int64_t b = begin; b < end; ++b) {
      const char* valid_row = there == nullptr ? nullptr : there + b * valid_sample;
      counts[b] = pick(dtype, from + b * sample_stride, stride, valid_row, valid_stride, keys + b * slots);
    }
  });
  for (int64_t b = 0; b < samples; ++b) {
    if (counts[b] < 0) {
      complain_of_nan(scores, valid, b);
    }
  }
  return {index, count};
}

void check_gather(const Tensor& x, const Tensor& index, int64_t rows) {
  if (x.dim() < 2 || index.dim() != 2 || index.size(0) != x.size(0) || (rows >= 0 && index.size(1) != rows)) {
    throw std::runtime_error("key_tokens_gather: index must be [B, K] like x [B, N, ...]");
  }
}

std::vector<int64_t> replaced(const Tensor& x, int64_t rows) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape[1] = rows;
  return shape;
}

// Values of one row of x [B, N, ...].
int64_t row_values(const Tensor& x) {
  int64_t values = 1;
  for (int64_t axis = 2; axis < x.dim(); ++axis) {
    values *= x.size(axis);
  }
  return values;
}

// x [B, N, ...], index int64 [B, K] -> [B, K, ...]: rows of bytes, or zeros at -1.
Tensor key_tokens_gather(const Tensor& x, const Tensor& index) {
  check_gather(x, index, -1);
  const int64_t samples = x.size(0), tokens = x.size(1), slots = index.size(1), values = row_values(x);
  const Tensor slot_index = dense(index);
  const int64_t* taken = static_cast<const int64_t*>(slot_index.const_data_ptr());
  for (int64_t at = 0; at < samples * slots; ++at) {
    if (taken[at] < -1 || taken[at] >= tokens) {
      throw std::runtime_error("gather_tokens: index must be in [-1, " + std::to_string(tokens) + "), got " +
                               std::to_string(taken[at]) + " at [" + std::to_string(at / slots) + ", " +
                               std::to_string(at % slots) + "]");
    }
  }
  const Tensor source = x.dim() <= 3 ? x : dense(x);  // one stride is enough for rows of one axis
  Tensor out = torch::stable::new_empty(x, replaced(x, slots));
  const int64_t bytes = static_cast<int64_t>(x.element_size()), row_bytes = values * bytes;
  const int64_t value_stride = source.dim() == 3 ? source.stride(2) : 1;
  const int64_t sample_stride = source.stride(0) * bytes, token_stride = source.stride(1) * bytes;
  const char* from = static_cast<const char*>(source.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  if (row_bytes == 0) {
    return out;
  }
  torch::stable::parallel_for(0, samples * slots, grain(row_bytes + 8), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (taken[row] < 0) {
        std::memset(to + row * row_bytes, 0, static_cast<size_t>(row_bytes));
      } else {
        const char* token = from + row / slots * sample_stride + taken[row] * token_stride;
        copy_row(to + row * row_bytes, token, values, value_stride, bytes);
      }
    }
  });
  return out;
}

// A complex number is summed as the two floats that it is.
Float part_type(const Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::ComplexHalf:
      return Float::f16;
    case ScalarType::ComplexFloat:
      return Float::f32;
    case ScalarType::ComplexDouble:
      return Float::f64;
    default:
      return float_type(x);
  }
}

// grad [B, K, ...], index int64 [B, K] -> [B, tokens, ...]: each token's slots, summed in ascending order.
Tensor key_tokens_gather_backward(const Tensor& grad, const Tensor& index, int64_t tokens) {
  check_gather(grad, index, grad.size(1));
  const int64_t samples = grad.size(0), slots = grad.size(1);
  const Float dtype = part_type(grad);
  const int64_t part_bytes = dtype == Float::f64 ? 8 : dtype == Float::f32 ? 4 : 2;
  const int64_t values = row_values(grad) * static_cast<int64_t>(grad.element_size()) / part_bytes;
  const Tensor source = dense(grad), slot_index = dense(index);
  Tensor out = torch::stable::new_empty(grad, replaced(grad, tokens));
  if (samples * tokens * values == 0) {
    return out;
  }
  Segments segments(samples, slots, tokens);
  const int64_t* taken = static_cast<const int64_t*>(slot_index.const_data_ptr());
  torch::stable::parallel_for(0, samples, grain(16 * (slots + tokens)), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      segments.sort(b, taken + b * slots);
    }
  });
  const Rows rows = {source.const_data_ptr(), slots * values, values};
  const SumJob job = {dtype,
                      rows,
                      values,
                      slots,
                      tokens,
                      nullptr,
                      nullptr,
                      segments.start(),
                      segments.members(),
                      out.mutable_data_ptr()};
  const int64_t cost = values * part_bytes * (1 + slots / tokens);
  torch::stable::parallel_for(0, samples * tokens, grain(cost),
                              [&](int64_t begin, int64_t end) { sum_segments(job, begin, end); });
  return out;
}

}  // namespace

void register_key_tokens(Library& library) {
  library.impl("key_tokens", TORCH_BOX(&key_tokens));
  library.impl("key_tokens_gather", TORCH_BOX(&key_tokens_gather));
  library.impl("key_tokens_gather_backward", TORCH_BOX(&key_tokens_gather_backward));
}

}  // namespace sparsify
