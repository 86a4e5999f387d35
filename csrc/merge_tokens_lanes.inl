// What the two kernels that look for the nearest key share. See merge_tokens.inl.

// The best of a row's lanes, ties to the lower slot, against the best of earlier tiles, which wins ties. No lane holds
// NaN.
template <class Floats, class Slots>
static inline void settle(const Floats& similarity, const Slots& slot, int64_t* assign, float* best) {
  constexpr int kLanes = sizeof(Slots) / 4;
  Slots partner[4];
  for (int step = 0; step < 4; ++step) {
    for (int lane = 0; lane < kLanes; ++lane) {
      partner[step][lane] = (lane ^ (1 << step)) & (kLanes - 1);
    }
  }
  Floats most = similarity;
  for (int step = 0; 1 << step < kLanes; ++step) {
    const Floats other = __builtin_shuffle(most, partner[step]);
    most = other > most ? other : most;
  }
  Slots first = similarity == most ? slot : Slots{} + INT32_MAX;
  for (int step = 0; 1 << step < kLanes; ++step) {
    const Slots other = __builtin_shuffle(first, partner[step]);
    first = other < first ? other : first;
  }
  if (most[0] > *best) {
    *best = most[0];
    *assign = first[0];
  }
}

// rows[i][j] <-> rows[j][i], by exchanging ever smaller blocks across the diagonal.
template <class Vector, class Mask>
static inline void transpose(Vector* rows) {
  constexpr int kLanes = sizeof(Vector) / sizeof(rows[0][0]);
#pragma GCC unroll 4
  for (int block = kLanes / 2; block > 0; block /= 2) {
    Mask upper, lower;
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) {
      upper[lane] = lane & block ? lane - block + kLanes : lane;
      lower[lane] = lane & block ? lane + kLanes : lane + block;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & block) == 0) {
        const Vector a = rows[i], b = rows[i + block];
        rows[i] = __builtin_shuffle(a, b, upper);
        rows[i + block] = __builtin_shuffle(a, b, lower);
      }
    }
  }
}
