// Scores as integers of the same order, for the selection in select.inl.

#include "floats.inl"
#include "select.inl"

// No valid score maps to this: invalid tokens rank below all, -inf included.
static constexpr int32_t kNowhere = INT32_MIN;

// to[i] = the i-th score in an order of integers, kNowhere where invalid. Returns whether a valid score is NaN.
template <class T>
static bool ordered_row(int32_t* __restrict to, const T* __restrict from, int64_t stride,
                        const uint8_t* __restrict valid, int64_t count) {
  int32_t nan = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float score = static_cast<float>(widen(from[i * stride])) + 0.0f;  // -0 becomes +0
    int32_t bits;
    __builtin_memcpy(&bits, &score, 4);
    nan |= static_cast<int32_t>((bits & INT32_MAX) > 0x7F800000) & static_cast<int32_t>(valid[i]);
    to[i] = valid[i] ? bits ^ (bits >> 31 & INT32_MAX) : kNowhere;
  }
  return nan != 0;
}

static bool order_scores(int32_t* to, Float dtype, const char* from, int64_t stride, const uint8_t* valid,
                         int64_t count) {
  switch (dtype) {
    case Float::f32:
      return ordered_row(to, reinterpret_cast<const float*>(from), stride, valid, count);
    case Float::f64:
      return ordered_row(to, reinterpret_cast<const double*>(from), stride, valid, count);
    case Float::bf16:
      return ordered_row(to, reinterpret_cast<const Bf16*>(from), stride, valid, count);
    default:
      return ordered_row(to, reinterpret_cast<const Fp16*>(from), stride, valid, count);
  }
}

static int32_t smallest_above(const int32_t* __restrict row, int64_t count, int32_t value) {
  int32_t smallest = INT32_MAX;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t candidate = row[i] > value ? row[i] : INT32_MAX;
    smallest = candidate < smallest ? candidate : smallest;
  }
  return smallest;
}

static const KeyKernels kKernels = {order_scores, count_above, largest_but, smallest_above, compact};
