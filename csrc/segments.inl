// Weighted sums of rows by segment. See segments.h.

#include "floats.inl"

// Adds R weighted rows, one after the other, to `sum`, or to zero if these are the `First`.
template <class T, int R, bool First>
static inline void add_rows(Sum<T>* __restrict sum, const T* const (&rows)[4], const Sum<T> (&weights)[4],
                            int64_t values) {
  const T* __restrict r0 = rows[0], * __restrict r1 = rows[1], * __restrict r2 = rows[2], * __restrict r3 = rows[3];
  for (int64_t c = 0; c < values; ++c) {
    Sum<T> total = First ? Sum<T>{0} : sum[c];
    total += weights[0] * widen(r0[c]);
    if constexpr (R > 1) {
      total += weights[1] * widen(r1[c]);
    }
    if constexpr (R > 2) {
      total += weights[2] * widen(r2[c]);
    }
    if constexpr (R > 3) {
      total += weights[3] * widen(r3[c]);
    }
    sum[c] = total;
  }
}

template <class T, bool First>
static inline void add_some(int64_t count, Sum<T>* sum, const T* const (&rows)[4], const Sum<T> (&weights)[4],
                            int64_t values) {
  switch (count) {
    case 1:
      return add_rows<T, 1, First>(sum, rows, weights, values);
    case 2:
      return add_rows<T, 2, First>(sum, rows, weights, values);
    case 3:
      return add_rows<T, 3, First>(sum, rows, weights, values);
    default:
      return add_rows<T, 4, First>(sum, rows, weights, values);
  }
}

// Multiplied by the reciprocal, which takes a tenth of the time of a division and costs half a rounding step; divided
// where the reciprocal of a size this small or large may not be a normal number.
template <class T>
static inline void write_row(T* __restrict to, const Sum<T>* __restrict sum, Sum<T> size, int64_t values) {
  if (size > Sum<T>(0x1p-100) && size < Sum<T>(0x1p100)) {
    const Sum<T> factor = 1 / size;
    for (int64_t c = 0; c < values; ++c) {
      narrow(sum[c] * factor, to + c);
    }
    return;
  }
  for (int64_t c = 0; c < values; ++c) {
    narrow(sum[c] / size, to + c);
  }
}

// `sum` holds `values` of scratch.
template <class T>
static void sum_typed(const SumJob& job, int64_t begin, int64_t end, Sum<T>* sum) {
  const T* rows = static_cast<const T*>(job.rows.data);
  const Sum<T>* weight = static_cast<const Sum<T>*>(job.weight);
  const Sum<T>* size = static_cast<const Sum<T>*>(job.size);
  const int64_t row_bytes = job.values * static_cast<int64_t>(sizeof(T));
  for (int64_t at = begin; at < end; ++at) {
    const int64_t b = at / job.segments, j = at % job.segments;
    const int64_t last = job.start[b * (job.segments + 1) + job.segments];
    T* to = static_cast<T*>(job.out) + at * job.values;
    if (size != nullptr && !(size[at] > 0)) {
      __builtin_memset(static_cast<void*>(to), 0, static_cast<size_t>(job.values) * sizeof(T));
      continue;
    }
    const int64_t* start = job.start + b * (job.segments + 1) + j;
    if (start[0] == start[1]) {
      __builtin_memset(sum, 0, static_cast<size_t>(job.values) * sizeof(Sum<T>));
    }
    for (int64_t m = start[0]; m < start[1]; m += 4) {
      const int64_t left = start[1] - m, count = left < 4 ? left : 4;
      const T* some[4];
      Sum<T> weights[4];
      for (int64_t r = 0; r < 4; ++r) {
        const int64_t i = job.members[b * job.count + m + (r < count ? r : 0)];
        some[r] = rows + job.rows.at(b, i);
        weights[r] = weight == nullptr ? Sum<T>{1} : weight[b * job.count + i];
      }
      // Members lie scattered, so the hardware cannot guess where the next begin; having begun, it can go on.
      for (int64_t next = m + count; next < m + count + 4 && next < last; ++next) {
        const char* row = reinterpret_cast<const char*>(rows + job.rows.at(b, job.members[b * job.count + next]));
        for (int64_t line = 0; line < 512 && line < row_bytes; line += 64) {
          __builtin_prefetch(row + line);
        }
      }
      if (m == start[0]) {
        add_some<T, true>(count, sum, some, weights, job.values);
      } else {
        add_some<T, false>(count, sum, some, weights, job.values);
      }
    }
    write_row(to, sum, size == nullptr ? Sum<T>{1} : size[at], job.values);
  }
}

static void sum_rows(const SumJob& job, int64_t begin, int64_t end, void* scratch) {
  switch (job.dtype) {
    case Float::f32:
      return sum_typed<float>(job, begin, end, static_cast<float*>(scratch));
    case Float::f64:
      return sum_typed<double>(job, begin, end, static_cast<double*>(scratch));
    case Float::bf16:
      return sum_typed<Bf16>(job, begin, end, static_cast<float*>(scratch));
    default:
      return sum_typed<Fp16>(job, begin, end, static_cast<float*>(scratch));
  }
}
