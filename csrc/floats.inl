// Float types widened to what sums are kept in, and narrowed again. Included inside the namespace and target of an
// instruction set, like all .inl files: without branches, so that loops over them are vectorised.

static inline float widen(float x) {
  return x;
}

static inline double widen(double x) {
  return x;
}

static inline float widen(Bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

static inline float widen(Fp16 x) {
  const uint32_t shifted = (x.bits & 0x7FFFu) << 13, exponent = shifted & 0x0F800000u;
  const uint32_t normal = shifted + 0x38000000u + (exponent == 0x0F800000u ? 0x38000000u : 0u);  // Inf and NaN stay so
  const uint32_t half_step = normal + 0x00800000u, magic_bits = 0x38800000u;
  float subnormal, magic;
  __builtin_memcpy(&subnormal, &half_step, 4);
  __builtin_memcpy(&magic, &magic_bits, 4);
  subnormal -= magic;
  uint32_t small;
  __builtin_memcpy(&small, &subnormal, 4);
  const uint32_t bits = (exponent == 0 ? small : normal) | (x.bits & 0x8000u) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

static inline void narrow(float x, float* to) {
  *to = x;
}

static inline void narrow(double x, double* to) {
  *to = x;
}

static inline void narrow(float x, Bf16* to) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  to->bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

static inline void narrow(float x, Fp16* to) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7FFFFFFFu;
  const uint32_t large = size > 0x7F800000u ? 0x7E00u : 0x7C00u;
  float shifted;  // adding 0.5 lines a subnormal's last bit up with fp32's, which rounds it
  __builtin_memcpy(&shifted, &size, 4);
  shifted += 0.5f;
  uint32_t small;
  __builtin_memcpy(&small, &shifted, 4);
  small -= 0x3F000000u;
  const uint32_t normal = (size - 0x38000000u + 0xFFFu + (size >> 13 & 1u)) >> 13;
  to->bits = static_cast<uint16_t>(sign | (size >= 0x47800000u ? large : size < 0x38800000u ? small : normal));
}

template <class T>
using Sum = decltype(widen(T{}));

template <class T>
static inline void widen_row(Sum<T>* __restrict to, const T* __restrict from, int64_t count) {
  for (int64_t c = 0; c < count; ++c) {
    to[c] = widen(from[c]);
  }
}
