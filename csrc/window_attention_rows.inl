// Rows of any float type as vectors of the accumulation type, and what a softmax needs besides exp. Included once an
// instruction set, after vector.inl.

constexpr int kBytes = SPARSIFY_VECTOR_BYTES;

inline int64_t rounded_up(int64_t count, int64_t unit) {
  return (count + unit - 1) / unit * unit;
}

inline int64_t smaller(int64_t one, int64_t other) {
  return one < other ? one : other;
}

template <class T, class A>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

typedef uint32_t Words __attribute__((vector_size(kBytes)));
typedef uint16_t HalfWords __attribute__((vector_size(kBytes / 2), aligned(2), may_alias));

// A vector from as many values of T.
template <class A, class T>
SPARSIFY_INLINE Vector<A> load_as(const T* from) {
  if constexpr (kSame<T, A>) {
    return load(from);
  } else if constexpr (kSame<T, Bf16>) {
    return reinterpret_cast<Vector<A>>(__builtin_convertvector(*reinterpret_cast<const HalfWords*>(from), Words) << 16);
  } else {
    A wide[Lanes<A>::width];
    for (int i = 0; i < Lanes<A>::width; ++i) {
      wide[i] = widen(from[i]);
    }
    return load(wide);
  }
}

template <class A, class T>
SPARSIFY_INLINE void store_as(T* to, Vector<A> value) {
  if constexpr (kSame<T, A>) {
    store(to, value);
  } else if constexpr (kSame<T, Bf16>) {
    const Words bits = reinterpret_cast<Words>(value), rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const Words half = (bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded;
    *reinterpret_cast<HalfWords*>(to) = __builtin_convertvector(half, HalfWords);
  } else {
    A wide[Lanes<A>::width];
    store(wide, value);
    for (int i = 0; i < Lanes<A>::width; ++i) {
      narrow(wide[i], to[i]);
    }
  }
}

// `count` values, zeros up to the next whole vector.
template <class A, class T>
SPARSIFY_INLINE void read_row(const T* from, int64_t count, A* to) {
  constexpr int width = Lanes<A>::width;
  int64_t i = 0;
  for (; i + width <= count; i += width) {
    store(to + i, load_as<A>(from + i));
  }
  if (i < count) {
    store(to + i, Vector<A>{});
    for (; i < count; ++i) {
      to[i] = widen(from[i]);
    }
  }
}

template <class A, class T>
SPARSIFY_INLINE void write_row(const A* from, int64_t count, A factor, T* to) {
  constexpr int width = Lanes<A>::width;
  int64_t i = 0;
  for (; i + width <= count; i += width) {
    store_as<A>(to + i, load(from + i) * factor);
  }
  for (; i < count; ++i) {
    narrow(from[i] * factor, to[i]);
  }
}

// The vector whose lane i is lane i ^ kStep of v.
template <class A, int kStep, int... kLane>
SPARSIFY_INLINE Vector<A> crossed(Vector<A> v) {
  if constexpr (sizeof...(kLane) < Lanes<A>::width) {
    return crossed<A, kStep, kLane..., static_cast<int>(sizeof...(kLane))>(v);
  } else {
#if defined(__clang__)
    return __builtin_shufflevector(v, v, (kLane ^ kStep)...);
#else
    return __builtin_shuffle(v, typename Lanes<A>::integers{(kLane ^ kStep)...});
#endif
  }
}

template <class A>
struct Add {
  static SPARSIFY_INLINE Vector<A> of(Vector<A> one, Vector<A> other) {
    return one + other;
  }
};

template <class A>
struct Most {
  static SPARSIFY_INLINE Vector<A> of(Vector<A> one, Vector<A> other) {
    return larger<A>(one, other);
  }
};

// All lanes in every lane.
template <class A, class Op, int kStep = Lanes<A>::width / 2>
SPARSIFY_INLINE Vector<A> everywhere(Vector<A> v) {
  if constexpr (kStep == 0) {
    return v;
  } else {
    return everywhere<A, Op, kStep / 2>(Op::of(v, crossed<A, kStep>(v)));
  }
}

// Halves of blocks of 2 * kStep lanes, the left one of the first vector's, the right one of the second's.
template <class A, class Op, int kStep, int... kLane>
SPARSIFY_INLINE Vector<A> merged(Vector<A> one, Vector<A> other) {
  if constexpr (sizeof...(kLane) < Lanes<A>::width) {
    return merged<A, Op, kStep, kLane..., static_cast<int>(sizeof...(kLane))>(one, other);
  } else {
    exchange<A, kStep, kLane...>(one, other);
    return Op::of(one, other);
  }
}

// Rows whose lanes are put together at once, which takes half of the steps that one after the other does.
template <class A>
constexpr int64_t kTogether = Lanes<A>::width < 4 ? 2 : 4;

// to[r] = all lanes of rows[r].
template <class A, class Op>
SPARSIFY_INLINE void together(const Vector<A>* rows, A* to) {
  constexpr int width = Lanes<A>::width;
  Vector<A> all = merged<A, Op, width / 2>(rows[0], rows[1]);
  if constexpr (kTogether<A> == 4) {
    all = merged<A, Op, width / 4>(all, merged<A, Op, width / 2>(rows[2], rows[3]));
    all = everywhere<A, Op, width / 8>(all);
  }
  for (int r = 0; r < kTogether<A>; ++r) {
    to[r] = all[kTogether<A> == 4 ? (r % 2 * 2 + r / 2) * (width / 4) : r];
  }
}

SPARSIFY_INLINE float root(float x) {
  return __builtin_sqrtf(x);
}
SPARSIFY_INLINE double root(double x) {
  return __builtin_sqrt(x);
}

template <class A>
SPARSIFY_INLINE Vector<A> root_of(Vector<A> v) {
#if SPARSIFY_VECTOR_BYTES == 64  // masked: of the plain forms GCC says that they read what was never written
  if constexpr (kSame<A, float>) {
    return _mm512_maskz_sqrt_ps(0xffff, v);
  } else {
    return _mm512_maskz_sqrt_pd(0xff, v);
  }
#else
  for (int i = 0; i < Lanes<A>::width; ++i) {
    v[i] = root(v[i]);
  }
  return v;
#endif
}

// log(x) for finite x >= 1, to an ulp of the larger of 1 and the result; NaN stays NaN. With x = 2^e m and s =
// (m - 1) / (m + 1) it is e log 2 + 2 (s + s^3 / 3 + ...), |s| < 0.172.
SPARSIFY_INLINE Vector<float> log_of(Vector<float> x) {
  const Words bits = reinterpret_cast<Words>(x), moved = bits - 0x3f3504f3u;  // m from sqrt(1/2) to sqrt(2)
  const Vector<float> e = __builtin_convertvector(reinterpret_cast<Lanes<float>::integers>(moved) >> 23, Vector<float>);
  const Vector<float> m = reinterpret_cast<Vector<float>>((moved & 0x007fffffu) + 0x3f3504f3u);
  const Vector<float> s = (m - 1.0f) / (m + 1.0f), square = s * s;
  Vector<float> p = square * (1.0f / 9) + 1.0f / 7;
  p = p * square + 1.0f / 5;
  p = p * square + 1.0f / 3;
  p = p * square * s + s;
  return e * 0.693147180f + (p + p) + (x - x);
}

SPARSIFY_INLINE Vector<double> log_of(Vector<double> x) {
  for (int i = 0; i < Lanes<double>::width; ++i) {
    x[i] = __builtin_log(x[i]);
  }
  return x;
}
