// What attention_scores multiplies where the machine has dot products of bf16: operands are pairs of numbers along the
// depth of a product. Products are exact, sums in fp32; probabilities are rounded to bf16 before they meet the values,
// their sums and `received` are not. Included inside a target that has them, after attention_scores.inl.
//
// The unit takes numbers below 2^-126 for zero, products and sums too. Heads with a value below 2^-100 that is not 0 go
// without it: in the others no probability above 2^-26 loses its value.

#include "small_values.inl"

struct alignas(4) Pair {
  Bf16 of[2];
};

template <>
struct Lanes<Pair> {
  static constexpr int width = SPARSIFY_VECTOR_BYTES / 4;
  typedef int32_t vector __attribute__((vector_size(SPARSIFY_VECTOR_BYTES)));
  typedef int32_t memory __attribute__((vector_size(SPARSIFY_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t integers __attribute__((vector_size(SPARSIFY_VECTOR_BYTES)));
};

template <>
constexpr int64_t kNumbers<Pair> = 2;

SPARSIFY_INLINE Vector<float> multiply_add(Pair left, Vector<Pair> right, Vector<float> total) {
  int32_t both;
  __builtin_memcpy(&both, &left, 4);
  return _mm512_dpbf16_ps(total, reinterpret_cast<__m512bh>(_mm512_set1_epi32(both)),
                          reinterpret_cast<__m512bh>(right));
}

// Beside each other, as the numbers along the depth of a product are.
SPARSIFY_INLINE void store_rounded(Pair* to, Vector<float> numbers) {
  const __m256bh rounded = _mm512_cvtneps_pbh(numbers);
  __builtin_memcpy(to, &rounded, 32);
}

// Above each other, as the numbers of two rows are.
SPARSIFY_INLINE void store_rounded(Pair* to, Vector<float> upper, Vector<float> lower) {
  const __m512bh rounded = _mm512_cvtne2ps_pbh(lower, upper);
  const auto turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                     20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i pairs = _mm512_permutexvar_epi16(turn, reinterpret_cast<__m512i>(rounded));
  __builtin_memcpy(to, &pairs, 64);
}

// Whether one of the rows from `begin` on has a value, not 0, so small that what becomes of it could be lost.
inline bool has_small_values(const Rows<Bf16>& rows, int64_t begin) {
  constexpr int kSmall = -100;
  bool small = false;
  for (int64_t i = begin; i < rows.count; ++i) {
    if (rows.column == 1) {
      small |= has_values_below<kSmall>(rows.at(i), rows.width);
    } else {
      for (int64_t c = 0; c < rows.width; ++c) {
        small |= has_values_below<kSmall>(rows.at(i) + c * rows.column, 1);
      }
    }
  }
  return small;
}

// Rows begin..end to [end - begin, ld], zeros beyond the width and the last row.
inline void pack_rows(const Rows<Bf16>& from, int64_t begin, int64_t end, Pair* to, int64_t ld) {
  for (int64_t i = begin; i < end; ++i, to += ld) {
    Bf16* numbers = to->of;
    const int64_t there = i < from.count ? from.width : 0;
    if (there > 0 && from.column == 1) {
      __builtin_memcpy(numbers, from.at(i), static_cast<size_t>(there) * sizeof(Bf16));
    } else {
      for (int64_t c = 0; c < there; ++c) {
        numbers[c] = from.at(i)[c * from.column];
      }
    }
    __builtin_memset(numbers + there, 0, static_cast<size_t>(2 * ld - there) * sizeof(Bf16));
  }
}

// Rows begin..end, two of them a step: each pair holds the numbers of one column.
inline void pack_steps(const Rows<Bf16>& from, int64_t begin, int64_t end, Pair* to, int64_t ld) {
  for (int64_t i = begin; i < end; i += 2, to += ld) {
    const int64_t there = i < from.count ? from.width : 0, column = from.column;
    const bool second = i + 1 < smaller(end, from.count);
    const Bf16* one = there > 0 ? from.at(i) : nullptr;
    const Bf16* other = there > 0 && second ? from.at(i + 1) : one;
    for (int64_t c = 0; c < there; ++c) {
      to[c] = {{one[c * column], other[c * column]}};
    }
    for (int64_t c = 0; c < there && !second; ++c) {
      to[c].of[1] = Bf16{};
    }
    __builtin_memset(to + there, 0, static_cast<size_t>(ld - there) * sizeof(Pair));
  }
}
