// Vectors, their exponential, conversions and a register-blocked matrix product, in GCC's vector types: one source for
// every instruction set. Included once an instruction set, inside a namespace and a target of its own, with
// SPARSIFY_VECTOR_BYTES set to its vector size; so nothing here may instantiate a function template of the standard
// library, which would be shared between the targets.

template <class A>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int width = SPARSIFY_VECTOR_BYTES / 4;
  typedef float vector __attribute__((vector_size(SPARSIFY_VECTOR_BYTES)));
  typedef float memory __attribute__((vector_size(SPARSIFY_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t integers __attribute__((vector_size(SPARSIFY_VECTOR_BYTES)));
  typedef int32_t integer;
  typedef uint32_t bits __attribute__((vector_size(SPARSIFY_VECTOR_BYTES)));
};

template <>
struct Lanes<double> {
  static constexpr int width = SPARSIFY_VECTOR_BYTES / 8;
  typedef double vector __attribute__((vector_size(SPARSIFY_VECTOR_BYTES)));
  typedef double memory __attribute__((vector_size(SPARSIFY_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t integers __attribute__((vector_size(SPARSIFY_VECTOR_BYTES)));
  typedef int64_t integer;
  typedef uint64_t bits __attribute__((vector_size(SPARSIFY_VECTOR_BYTES)));
};

template <class A>
using Vector = typename Lanes<A>::vector;

#define SPARSIFY_INLINE inline __attribute__((always_inline))

template <class A>
SPARSIFY_INLINE Vector<A> load(const A* from) {
  return *reinterpret_cast<const typename Lanes<A>::memory*>(from);
}

template <class A>
SPARSIFY_INLINE void store(A* to, Vector<A> value) {
  *reinterpret_cast<typename Lanes<A>::memory*>(to) = value;
}

// The larger one; the second where either is NaN.
template <class A>
SPARSIFY_INLINE Vector<A> larger(Vector<A> one, Vector<A> other) {
  return one > other ? one : other;
}

template <class A>
SPARSIFY_INLINE A largest_of(Vector<A> v) {
  A best = v[0];
  for (int i = 1; i < Lanes<A>::width; ++i) {
    best = v[i] > best ? v[i] : best;
  }
  return best;
}

// What exp needs: x = n log 2 + f with |f| <= log(2) / 2, exp(x) = 2^n exp(f). log 2 is split in two so that n times
// the first part is exact. `shift` is 1.5 * 2^mantissa bits: adding it rounds to an integer. Below `lowest` n is the
// exponent of zero: the result is exactly 0, for -inf too.
template <class A>
struct ExpOf;

template <>
struct ExpOf<float> {
  static constexpr float lowest = -88.0f, shift = 12582912.0f, log2e = 1.44269504f;
  static constexpr float log2_high = 0.693359375f, log2_low = -2.12194440e-4f;
  static constexpr int mantissa = 23, bias = 127;
  // 1 + f + f^2 (...): fitted to a relative error of 3.1e-9.
  static SPARSIFY_INLINE Vector<float> polynomial(Vector<float> f) {
    Vector<float> p = 0x1.6a23d0p-10f * f + 0x1.123a20p-7f;
    p = p * f + 0x1.5558f2p-5f;
    p = p * f + 0x1.555492p-3f;
    p = p * f + 0x1.fffffcp-2f;
    return (p * f + 1.0f) * f + 1.0f;
  }
};

template <>
struct ExpOf<double> {
  static constexpr double lowest = -709.0, shift = 6755399441055744.0, log2e = 1.4426950408889634;
  static constexpr double log2_high = 6.93147180369123816490e-01, log2_low = 1.90821492927058770002e-10;
  static constexpr int mantissa = 52, bias = 1023;
  // The Taylor series to f^13: what is left out is below 1e-17.
  static SPARSIFY_INLINE Vector<double> polynomial(Vector<double> f) {
    Vector<double> p = (1.0 / 6227020800.0) * f + 1.0 / 479001600.0;
    p = p * f + 1.0 / 39916800.0;
    p = p * f + 1.0 / 3628800.0;
    p = p * f + 1.0 / 362880.0;
    p = p * f + 1.0 / 40320.0;
    p = p * f + 1.0 / 5040.0;
    p = p * f + 1.0 / 720.0;
    p = p * f + 1.0 / 120.0;
    p = p * f + 1.0 / 24.0;
    p = p * f + 1.0 / 6.0;
    p = p * f + 0.5;
    return (p * f + 1.0) * f + 1.0;
  }
};

// exp(x) for x up to a little above 0; NaN stays NaN.
template <class A>
SPARSIFY_INLINE Vector<A> exp_of(Vector<A> x) {
  using E = ExpOf<A>;
  using Bits = typename Lanes<A>::bits;
  x = larger<A>(Vector<A>{} + E::lowest, x);
  const Vector<A> shifted = x * E::log2e + E::shift;
  const Vector<A> n = shifted - E::shift;
  const Vector<A> f = (x - n * E::log2_high) - n * E::log2_low;
  // The low bits of `shifted` are n; the shift throws away all others.
  const Bits exponent = (reinterpret_cast<Bits>(shifted) + E::bias) << E::mantissa;
  return E::polynomial(f) * reinterpret_cast<Vector<A>>(exponent);
}

SPARSIFY_INLINE float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

SPARSIFY_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

SPARSIFY_INLINE float widen(float x) {
  return x;
}
SPARSIFY_INLINE double widen(double x) {
  return x;
}
SPARSIFY_INLINE float widen(Bf16 x) {
  return bits_to_float(uint32_t{x.bits} << 16);
}
// Without a branch: the product with 2^112 mends the exponent, subnormals included.
SPARSIFY_INLINE float widen(Fp16 x) {
  const uint32_t sign = uint32_t{x.bits} >> 15 << 31, rest = (uint32_t{x.bits} & 0x7fffu) << 13;
  const uint32_t finite = float_to_bits(bits_to_float(rest) * 0x1p112f);
  return bits_to_float(sign | (rest >= 0x0f800000u ? rest | 0x7f800000u : finite));
}

SPARSIFY_INLINE void narrow(float x, float& to) {
  to = x;
}
SPARSIFY_INLINE void narrow(double x, double& to) {
  to = x;
}
// To the nearest, ties to even; NaN stays NaN.
SPARSIFY_INLINE void narrow(float x, Bf16& to) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
}
// The same; a subnormal result is rounded by adding 0.5, whose last bit is worth the smallest subnormal.
SPARSIFY_INLINE void narrow(float x, Fp16& to) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  const uint32_t normal = (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1)) >> 13;
  const uint32_t subnormal = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u;
  const uint32_t special = rest > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = rest >= 0x47800000u ? special : rest < 0x38800000u ? subnormal : normal;
  to.bits = static_cast<uint16_t>(sign | half);
}

// `count` values, `stride` apart.
template <class T, class A>
inline void widen_row(const T* from, int64_t stride, int64_t count, A* __restrict to) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = widen(from[i]);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = widen(from[i * stride]);
    }
  }
}

template <class T, class A>
inline void narrow_row(const A* __restrict from, A factor, int64_t count, T* __restrict to) {
  for (int64_t i = 0; i < count; ++i) {
    narrow(from[i] * factor, to[i]);
  }
}

template <class A>
inline void fill(A* to, int64_t count, A value) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = value;
  }
}

// Exchanges off-diagonal blocks of kStep x kStep, the half that lies kStep away: done for every power of two below
// the width, this transposes.
template <class A, int kStep, int... kLane>
SPARSIFY_INLINE void exchange(Vector<A>& upper, Vector<A>& lower) {
  constexpr int width = Lanes<A>::width;
  const Vector<A> a = upper, b = lower;
#if defined(__clang__)
  upper = __builtin_shufflevector(a, b, (kLane & kStep ? width + kLane - kStep : kLane)...);
  lower = __builtin_shufflevector(a, b, (kLane & kStep ? width + kLane : kLane + kStep)...);
#else
  using Integers = typename Lanes<A>::integers;
  upper = __builtin_shuffle(a, b, Integers{(kLane & kStep ? width + kLane - kStep : kLane)...});
  lower = __builtin_shuffle(a, b, Integers{(kLane & kStep ? width + kLane : kLane + kStep)...});
#endif
}

template <class A, int kStep, int... kLane>
SPARSIFY_INLINE void exchange_all(Vector<A>* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < Lanes<A>::width; ++i) {
    if ((i & kStep) == 0) {
      exchange<A, kStep, kLane...>(rows[i], rows[i + kStep]);
    }
  }
  if constexpr (kStep > 1) {
    exchange_all<A, kStep / 2, kLane...>(rows);
  }
}

template <class A, int... kLane>
SPARSIFY_INLINE void transpose_lanes(Vector<A>* rows) {
  if constexpr (sizeof...(kLane) < Lanes<A>::width) {
    transpose_lanes<A, kLane..., static_cast<int>(sizeof...(kLane))>(rows);
  } else {
    exchange_all<A, Lanes<A>::width / 2, kLane...>(rows);
  }
}

// A square of `width` rows, `from_row` apart, to its transpose, of which the first `rows` are kept.
template <class A>
SPARSIFY_INLINE void transpose_square(const A* from, int64_t from_row, A* to, int64_t to_row, int64_t rows) {
  constexpr int width = Lanes<A>::width;
  Vector<A> square[width];
#pragma GCC unroll 16
  for (int i = 0; i < width; ++i) {
    square[i] = load(from + i * from_row);
  }
  transpose_lanes<A>(square);
#pragma GCC unroll 16
  for (int i = 0; i < width; ++i) {
    if (i < rows) {
      store(to + i * to_row, square[i]);
    }
  }
}

// Rows and vectors that a block of the product keeps in registers: 24 of AVX-512's 32, 12 of the 16 elsewhere.
constexpr int kBlockRows = 6;
constexpr int kBlockVectors = SPARSIFY_VECTOR_BYTES == 64 ? 4 : 2;

// Numbers along the depth of a product that one operand holds, and what it takes to hold `count` of them.
template <class O>
constexpr int64_t kNumbers = 1;
template <class O>
SPARSIFY_INLINE int64_t steps(int64_t count) {
  return (count + kNumbers<O> - 1) / kNumbers<O>;
}

// One step of a product: with the type of the operands may come another sum than this one.
template <class A>
SPARSIFY_INLINE Vector<A> multiply_add(A left, Vector<A> right, Vector<A> total) {
  return total + left * right;
}

// What becomes of a product: c = product * factor, onto what is there or not, plus an addend (a row, for every row of
// c) if there is one.
template <class A>
struct Finish {
  const A* addend;
  A factor;
  bool onto;
};

template <class O>
using Sum = typename Accumulator<O>::type;

// A is [rows, depth], or [depth, rows] where kTransposed; B [depth, vectors].
template <class O, bool kTransposed, int kRows, int kVectors>
void block(int64_t depth, const O* a, int64_t a_row, const O* b, int64_t b_row, Sum<O>* c, int64_t c_row,
           const Finish<Sum<O>>& finish) {
  using A = Sum<O>;
  constexpr int width = Lanes<A>::width;
  Vector<A> total[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector<O> right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      right[v] = load(b + k * b_row + v * width);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const O left = kTransposed ? a[k * a_row + r] : a[r * a_row + k];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        total[r][v] = multiply_add(left, right[v], total[r][v]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      A* to = c + r * c_row + v * width;
      const Vector<A> there = finish.onto ? load(to) : Vector<A>{};
      if (finish.addend == nullptr) {
        store(to, there + total[r][v] * finish.factor);
      } else {
        const Vector<A> addend = load(finish.addend + v * width);
        store(to, finish.onto ? (there + total[r][v] * finish.factor) + addend : total[r][v] * finish.factor + addend);
      }
    }
  }
}

template <class O>
using Block = void (*)(int64_t, const O*, int64_t, const O*, int64_t, Sum<O>*, int64_t, const Finish<Sum<O>>&);

template <class O, bool kTransposed>
struct Blocks {
  template <int kRows, int kVectors>
  static constexpr Block<O> pick(int vectors) {
    if constexpr (kVectors > 1) {
      return vectors == kVectors ? block<O, kTransposed, kRows, kVectors> : pick<kRows, kVectors - 1>(vectors);
    } else {
      return block<O, kTransposed, kRows, 1>;
    }
  }
  template <int kRows>
  static constexpr Block<O> pick(int rows, int vectors) {
    if constexpr (kRows > 1) {
      return rows == kRows ? pick<kRows, kBlockVectors>(vectors) : pick<kRows - 1>(rows, vectors);
    } else {
      return pick<1, kBlockVectors>(vectors);
    }
  }
};

// C [rows, vectors * width] from A [rows, depth] ([depth, rows] where kTransposed) times B [depth, vectors * width].
// Blocks of nearly equal size; their sizes, and so the rounding, depend on the sizes alone.
template <class O, bool kTransposed>
inline void multiply(int64_t rows, int64_t vectors, int64_t depth, const O* a, int64_t a_row, const O* b, int64_t b_row,
                     Sum<O>* c, int64_t c_row, Finish<Sum<O>> finish) {
  constexpr int width = Lanes<O>::width;
  const int64_t down = (rows + kBlockRows - 1) / kBlockRows, across = (vectors + kBlockVectors - 1) / kBlockVectors;
  for (int64_t j = 0; j < across; ++j) {
    const int64_t left = vectors * j / across, some_vectors = vectors * (j + 1) / across - left, at = left * width;
    const Finish<Sum<O>> here{finish.addend != nullptr ? finish.addend + at : nullptr, finish.factor, finish.onto};
    for (int64_t i = 0; i < down; ++i) {
      const int64_t top = rows * i / down, some_rows = rows * (i + 1) / down - top;
      const Block<O> run = Blocks<O, kTransposed>::template pick<kBlockRows>(static_cast<int>(some_rows),
                                                                             static_cast<int>(some_vectors));
      run(depth, a + (kTransposed ? top : top * a_row), a_row, b + at, b_row, c + top * c_row + at, c_row, here);
    }
  }
}
