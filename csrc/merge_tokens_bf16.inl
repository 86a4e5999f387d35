// The nearest key by AVX-512's dot products of pairs of bf16: 12 tokens by 32 keys at a time, each sum over the width
// in ascending order of pairs. Included inside a target that has them.

#include "merge_tokens_pairs.inl"

struct Pairs {
  static constexpr int64_t kTokens = 12;

  static inline void multiply(const PairJob& job, Sixteen (&sums)[kTokens][2]) {
    if (job.keys > 16) {
      multiply_by<2>(job, sums);
    } else {
      multiply_by<1>(job, sums);
    }
  }

  // By V times 16 keys; beyond them NaN, as in the panel.
  template <int V>
  static inline void multiply_by(const PairJob& job, Sixteen (&out)[kTokens][2]) {
    Sixteen sums[kTokens][V] = {};
    for (int64_t step = 0; step < job.steps; ++step) {
      const uint16_t* rows = job.rows + step * 2 * kPairs;
      const uint32_t* keys = job.panel + step * kKeys * kPairs;
      for (int64_t pair = 0; pair < kPairs; ++pair, rows += 2, keys += 16) {
        __m512bh key[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          __builtin_memcpy(&key[v], keys + v * 16 * kPairs, 64);
        }
#pragma GCC unroll 12
        for (int64_t r = 0; r < kTokens; ++r) {
          int32_t row;
          __builtin_memcpy(&row, rows + r * job.pitch, 4);
          const auto both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(row));
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) {
            sums[r][v] = _mm512_dpbf16_ps(sums[r][v], both, key[v]);
          }
        }
      }
    }
#pragma GCC unroll 12
    for (int64_t r = 0; r < kTokens; ++r) {
      out[r][0] = sums[r][0];
      out[r][1] = V == 2 ? sums[r][V - 1] : Sixteen{} + __builtin_nanf("");
    }
  }
};

static void assign(const AssignJob& job, void* keys, void* rows, float* best) {
  assign_pairs<Pairs>(job, keys, rows, best);
}
