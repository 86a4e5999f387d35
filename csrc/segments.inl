// Weighted sums of rows by segment. See segments.h.

#include "floats.inl"

template <class T>
static inline void add_row(Sum<T>* __restrict sum, const T* __restrict row, int64_t stride, Sum<T> weight,
                           int64_t values) {
  if (stride == 1) {
    for (int64_t c = 0; c < values; ++c) {
      sum[c] += weight * widen(row[c]);
    }
    return;
  }
  for (int64_t c = 0; c < values; ++c) {
    sum[c] += weight * widen(row[c * stride]);
  }
}

template <class T>
static inline void write_row(T* __restrict to, const Sum<T>* __restrict sum, Sum<T> divisor, int64_t values) {
  for (int64_t c = 0; c < values; ++c) {
    narrow(sum[c] / divisor, to + c);
  }
}

// `sum` holds `values` of scratch.
template <class T>
static void sum_typed(const SumJob& job, int64_t begin, int64_t end, Sum<T>* sum) {
  const T* rows = static_cast<const T*>(job.rows.data);
  const Sum<T>* weight = static_cast<const Sum<T>*>(job.weight);
  const Sum<T>* size = static_cast<const Sum<T>*>(job.size);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t b = at / job.segments, j = at % job.segments;
    T* to = static_cast<T*>(job.out) + at * job.values;
    if (size != nullptr && !(size[at] > 0)) {
      __builtin_memset(static_cast<void*>(to), 0, static_cast<size_t>(job.values) * sizeof(T));
      continue;
    }
    __builtin_memset(sum, 0, static_cast<size_t>(job.values) * sizeof(Sum<T>));
    const int64_t* start = job.start + b * (job.segments + 1) + j;
    for (int64_t m = start[0]; m < start[1]; ++m) {
      const int64_t i = job.members[b * job.count + m];
      const T* row = rows + job.rows.at(b, i);
      add_row(sum, row, job.rows.value_stride, weight == nullptr ? Sum<T>{1} : weight[b * job.count + i], job.values);
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
