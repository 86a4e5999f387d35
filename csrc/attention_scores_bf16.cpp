// attention_scores for bf16 on machines that multiply its numbers in pairs.

#include "attention_scores.h"
#include "common.h"

#if defined(SPARSIFY_PAIRS)
#include <immintrin.h>
#endif

namespace sparsify {
namespace {

#if defined(SPARSIFY_PAIRS)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512,avx512bf16")
namespace pairs {
#define SPARSIFY_VECTOR_BYTES 64
#include "vector.inl"
// The kernels need its vectors.
#include "attention_scores.inl"
// The operands need both.
#include "attention_scores_pairs.inl"
// The backward needs the forward's.
#include "attention_scores_backward.inl"
#undef SPARSIFY_VECTOR_BYTES
}  // namespace pairs
#pragma GCC pop_options
#endif

}  // namespace

const AttentionKernels* bf16_attention() {
#if defined(SPARSIFY_PAIRS)
  static constexpr AttentionKernels kPairs = {pairs::Forward<float, pairs::Pair>::run<Bf16>,
                                              pairs::Backward<float, pairs::Pair>::run<Bf16>};
  static const bool use = allowed_bf16_units() != Bf16Units::none && has_pairs();
  return use ? &kPairs : nullptr;
#else
  return nullptr;
#endif
}

}  // namespace sparsify
