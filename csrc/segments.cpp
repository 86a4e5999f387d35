// Sums of rows by destination, for every op that has them.

#include "segments.h"

#include <memory>

namespace sparsify {
namespace {

namespace base {
#include "segments.inl"
}

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "segments.inl"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
namespace avx512 {
#include "segments.inl"
}
#pragma GCC pop_options
#endif

auto pick_sum_rows() {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::avx512:
      return avx512::sum_rows;
    case Isa::avx2:
      return avx2::sum_rows;
    default:
      break;
  }
#endif
  return base::sum_rows;
}

}  // namespace

void sum_segments(const SumJob& job, int64_t begin, int64_t end) {
  if (job.values == 0) {
    return;
  }
  const auto scratch = std::make_unique<double[]>(static_cast<size_t>(job.values));
  pick_sum_rows()(job, begin, end, scratch.get());
}

}  // namespace sparsify
