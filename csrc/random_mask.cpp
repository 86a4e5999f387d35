// random_mask on the CPU: draw a key a unit, keep the units with the smallest,
// copy those and read no other. The definition is
// sparsify_kernels/random_mask/reference.py; the index is bit-identical to it.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>

#include "common.h"

namespace sparsify {
namespace {

struct MaskKernels {
  void (*unit_keys)(uint32_t*, int64_t, uint32_t, uint64_t);
  void (*select_units)(const uint32_t*, int64_t, int64_t, int32_t*, int64_t*);
};

namespace base {
constexpr int kVectorBytes = 16;
#include "random_mask.inl"
}  // namespace base

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int kVectorBytes = 32;
#include "random_mask.inl"
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
namespace avx512 {
constexpr int kVectorBytes = 64;
#include "random_mask.inl"
}  // namespace avx512
#pragma GCC pop_options
#endif

const MaskKernels& pick_mask_kernels() {
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

// The units with the smallest keys within each 2x2 block of a grid `width` units wide: a unit stays when fewer than
// `per_block` come before it.
void select_in_blocks(const uint32_t* keys, int64_t units, int64_t width, int64_t per_block, int64_t* index) {
  for (int64_t u = 0, j = 0; u < units; ++u) {
    const int64_t row = u / width, col = u % width;
    const int64_t corner = (row - row % 2) * width + (col - col % 2);
    int64_t before = 0;
    for (int64_t other : {corner, corner + 1, corner + width, corner + width + 1}) {
      before += keys[other] < keys[u] || (keys[other] == keys[u] && other < u);
    }
    if (before < per_block) {
      index[j++] = u;
    }
  }
}

void check(bool ok, const char* text) {
  if (!ok) {
    throw std::runtime_error(text);
  }
}

// The size and seed checks that the kernel's memory safety and the contract
// rest on; the public function has made all others.
void check_arguments(const Tensor& x, const Tensor& seed, int64_t kept, int64_t grid_width) {
  const int64_t samples = x.size(0), units = x.size(1);
  check(kept >= 1 && kept <= units && units < (int64_t{1} << 32),
        "random_mask: kept must be in [1, U], with U < 2**32");
  const bool fits = grid_width > 0 && grid_width % 2 == 0 && units % (2 * grid_width) == 0 && 4 * kept % units == 0;
  check(grid_width == 0 || fits,
        "random_mask: grid_width must be an even divisor of U, and kept 1, 2 "
        "or 3 quarters of U");
  check(seed.dim() == 0 || (seed.dim() == 1 && seed.size(0) == samples), "random_mask: seed must be [] or [B]");
  const int64_t* seeds = static_cast<const int64_t*>(seed.const_data_ptr());
  for (int64_t b = 0; b < seed.numel(); ++b) {
    const int64_t value = seeds[seed.dim() == 0 ? 0 : b * seed.stride(0)];
    if (value < 0) {
      throw std::runtime_error("random_mask: seed must be in [0, 2**63), got " + std::to_string(value));
    }
  }
}

// Draws the units of one sample that stay.
class Draw {
 public:
  Draw(const Tensor& seed, int64_t units, int64_t kept, int64_t grid_width)
      : seeds_(static_cast<const int64_t*>(seed.const_data_ptr())),
        seed_stride_(seed.dim() == 0 ? 0 : seed.stride(0)),
        shared_(seed.dim() == 0),
        units_(units),
        kept_(kept),
        grid_width_(grid_width),
        kernels_(pick_mask_kernels()) {}

  // Samples begin..end of index [B, K].
  void operator()(int64_t begin, int64_t end, int64_t* index) const {
    const auto keys = std::make_unique<uint32_t[]>(static_cast<size_t>(units_));
    constexpr size_t kWidestBlock = 64;  // numbers in four vectors of AVX-512
    const auto row = std::make_unique<int32_t[]>(static_cast<size_t>(units_) + kWidestBlock);
    const auto found = std::make_unique<int64_t[]>(static_cast<size_t>(kept_) + 1);
    for (int64_t b = begin; b < end; ++b) {
      const uint64_t seed = static_cast<uint64_t>(seeds_[b * seed_stride_]);
      kernels_.unit_keys(keys.get(), units_, shared_ ? static_cast<uint32_t>(b) : 0, seed);
      if (grid_width_ > 0) {
        select_in_blocks(keys.get(), units_, grid_width_, 4 * kept_ / units_, index + b * kept_);
      } else {
        kernels_.select_units(keys.get(), units_, kept_, row.get(), found.get());
        std::copy_n(found.get(), kept_, index + b * kept_);
      }
    }
  }

 private:
  const int64_t* seeds_;
  int64_t seed_stride_;
  bool shared_;
  int64_t units_, kept_, grid_width_;
  const MaskKernels& kernels_;
};

// Copies the units that stay, and reads no other.
class Copy {
 public:
  Copy(const Tensor& x, const Tensor& tokens)
      : from_(static_cast<const char*>(x.const_data_ptr())),
        to_(static_cast<char*>(tokens.mutable_data_ptr())),
        values_(x.size(2)),
        kept_(tokens.size(1)),
        bytes_(static_cast<int64_t>(x.element_size())),
        sample_stride_(x.stride(0) * bytes_),
        unit_stride_(x.stride(1) * bytes_),
        value_stride_(x.stride(2)),
        streamed_(tokens.numel() * bytes_ >= kStreamFrom && (value_stride_ == 1 || values_ == 1) &&
                  row_bytes() % 64 == 0 && reinterpret_cast<uintptr_t>(to_) % 64 == 0) {}

  int64_t row_bytes() const {
    return values_ * bytes_;
  }

  // Rows begin..end of [B * K].
  void operator()(int64_t begin, int64_t end, const int64_t* index) const {
    for (int64_t row = begin; row < end && row_bytes() > 0; ++row) {
      const char* unit = from_ + row / kept_ * sample_stride_ + index[row] * unit_stride_;
      // The hardware cannot guess where the next unit begins; having begun to read it, it can go on.
      const int64_t next = row + 1 < end ? row + 1 : row;
      const char* ahead = from_ + next / kept_ * sample_stride_ + index[next] * unit_stride_;
      for (int64_t line = 0; line < 1024 && line < row_bytes(); line += 64) {
        __builtin_prefetch(ahead + line);
      }
      char* to = to_ + row * row_bytes();
      if (streamed_) {
        for (int64_t line = 0; line < row_bytes(); line += 64) {
          stream_line(to + line, unit + line);
        }
      } else {
        copy_row(to, unit, values_, value_stride_, bytes_);
      }
    }
    if (streamed_) {
      end_stream();
    }
  }

 private:
  static constexpr int64_t kStreamFrom = 16 << 20;  // bytes: more than the caches of a core hold

  const char* from_;
  char* to_;
  int64_t values_, kept_, bytes_, sample_stride_, unit_stride_, value_stride_;
  bool streamed_;  // tokens are written past the caches, which need not read first what is overwritten
};

// x [B, U, P], seed int64 [] or [B] -> tokens [B, K, P], index int64 [B, K].
std::tuple<Tensor, Tensor> random_mask(const Tensor& x, const Tensor& seed, int64_t kept, int64_t grid_width) {
  check_arguments(x, seed, kept, grid_width);
  const int64_t samples = x.size(0), units = x.size(1);
  Tensor tokens = torch::stable::new_empty(x, {samples, kept, x.size(2)});
  Tensor index = torch::stable::new_empty(seed, {samples, kept});
  int64_t* kept_units = static_cast<int64_t*>(index.mutable_data_ptr());
  const Draw draw(seed, units, kept, grid_width);
  const Copy copy(x, tokens);

  const int64_t threads = torch::stable::get_num_threads();
  if (samples >= 4 * threads) {  // whole samples to each thread: threads meet once
    const int64_t cost = 64 * units + kept * copy.row_bytes();
    torch::stable::parallel_for(0, samples, grain(cost), [&](int64_t begin, int64_t end) {
      draw(begin, end, kept_units);
      copy(begin * kept, end * kept, kept_units);
    });
  } else {
    torch::stable::parallel_for(0, samples, grain(64 * units),
                                [&](int64_t begin, int64_t end) { draw(begin, end, kept_units); });
    torch::stable::parallel_for(0, samples * kept, grain(copy.row_bytes()),
                                [&](int64_t begin, int64_t end) { copy(begin, end, kept_units); });
  }
  return {tokens, index};
}

// grad [B, K, P], index int64 [B, K] ascending -> [B, units, P]: every row is
// written once, a copy or zeros.
Tensor random_mask_backward(const Tensor& grad, const Tensor& index, int64_t units) {
  const int64_t samples = grad.size(0), kept = grad.size(1), values = grad.size(2);
  check(index.dim() == 2 && index.size(0) == samples && index.size(1) == kept && units >= 0,
        "random_mask_backward: index must be [B, K] like grad [B, K, P]");
  const Tensor dense_index = torch::stable::contiguous(index);
  Tensor out = torch::stable::new_empty(grad, {samples, units, values});
  const int64_t bytes = static_cast<int64_t>(grad.element_size()), row_bytes = values * bytes;
  if (row_bytes == 0) {
    return out;
  }
  const int64_t* kept_units = static_cast<const int64_t*>(dense_index.const_data_ptr());
  const char* from = static_cast<const char*>(grad.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t sample_stride = grad.stride(0) * bytes, slot_stride = grad.stride(1) * bytes,
                value_stride = grad.stride(2);

  torch::stable::parallel_for(0, samples * units, grain(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {  // row of [B * U]
      const int64_t b = row / units, u = row % units;
      const int64_t* first = kept_units + b * kept;
      const int64_t* slot = std::lower_bound(first, first + kept, u);
      if (slot != first + kept && *slot == u) {
        copy_row(to + row * row_bytes, from + b * sample_stride + (slot - first) * slot_stride, values, value_stride,
                 bytes);
      } else {
        std::memset(to + row * row_bytes, 0, static_cast<size_t>(row_bytes));
      }
    }
  });
  return out;
}

}  // namespace

void register_random_mask(Library& library) {
  library.impl("random_mask", TORCH_BOX(&random_mask));
  library.impl("random_mask_backward", TORCH_BOX(&random_mask_backward));
}

}  // namespace sparsify
