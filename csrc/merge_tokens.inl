// The nearest key of every token, and the gradients. Each dot product is one sum over the width in ascending order, so
// that it does not depend on what is computed beside it.

#include "floats.inl"
#include "merge_tokens_lanes.inl"

template <class T>
struct IndexLike {
  using Type = int32_t;
};

template <>
struct IndexLike<double> {
  using Type = int64_t;
};

template <class T>
struct Lanes {
  static constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(T));
  using Index = typename IndexLike<T>::Type;
  typedef Index Mask __attribute__((vector_size(kVectorBytes)));
  typedef T Sums __attribute__((vector_size(kVectorBytes)));
  typedef float Floats __attribute__((vector_size(kVectorBytes * 4 / sizeof(T))));
  typedef int32_t Slots __attribute__((vector_size(kVectorBytes * 4 / sizeof(T))));
};

static constexpr int64_t kChunk = 64;  // values of a row that lie together in a block of rows

// rows [chunks][kBlock][kChunk] . panel [dim][V * lanes] -> sums [kBlock][V]
template <class T, int V>
static inline void dots(const T* __restrict rows, const T* __restrict panel, int64_t dim,
                        typename Lanes<T>::Sums (&out)[kBlock][V]) {
  using Sums = typename Lanes<T>::Sums;
  Sums sums[kBlock][V] = {};
  for (int64_t chunk = 0; chunk < dim; chunk += kChunk, rows += kBlock * kChunk) {
    const int64_t values = dim - chunk < kChunk ? dim - chunk : kChunk;
    for (int64_t c = 0; c < values; ++c, panel += V * Lanes<T>::kCount) {
      Sums keys[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        __builtin_memcpy(&keys[v], panel + v * Lanes<T>::kCount, sizeof(Sums));
      }
#pragma GCC unroll 16
      for (int r = 0; r < kBlock; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          sums[r][v] += rows[r * kChunk + c] * keys[v];
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kBlock; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      out[r][v] = sums[r][v];
    }
  }
}

// The best key that each lane has met, for a block of rows.
template <class T>
struct Best {
  typename Lanes<T>::Floats similarity[kBlock];
  typename Lanes<T>::Slots slot[kBlock];
};

// Meets one panel of keys, whose first is `slot`. NaN, where a panel is not full, wins no comparison.
template <class T, int V>
static inline void meet(Best<T>& best, const T* rows, const T* panel, int64_t dim, int32_t slot) {
  typename Lanes<T>::Sums sums[kBlock][V];
  dots<T, V>(rows, panel, dim, sums);
  typename Lanes<T>::Slots slots;
  for (int lane = 0; lane < Lanes<T>::kCount; ++lane) {
    slots[lane] = slot + lane;
  }
  for (int v = 0; v < V; ++v, slots += Lanes<T>::kCount) {
    for (int r = 0; r < kBlock; ++r) {
      const auto similarity = __builtin_convertvector(sums[r][v], typename Lanes<T>::Floats);
      const auto better = similarity > best.similarity[r];
      best.similarity[r] = better ? similarity : best.similarity[r];
      best.slot[r] = better ? slots : best.slot[r];
    }
  }
}

// panel [dim][width] = `count` keys side by side, NaN beside them; a square of lanes at a time.
template <class S>
static void pack_keys(Sum<S>* panel, const AssignJob& job, const int64_t* keys, int64_t count, int64_t width) {
  using T = Sum<S>;
  constexpr int64_t kLanes = Lanes<T>::kCount;
  const S* metric = static_cast<const S*>(job.metric);
  for (int64_t group = 0; group < width; group += kLanes) {
    for (int64_t begin = 0; begin < job.dim; begin += kLanes) {
      const int64_t values = job.dim - begin < kLanes ? job.dim - begin : kLanes;
      typename Lanes<T>::Sums square[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        T row[kLanes] = {};
        if (group + lane >= count) {
          square[lane] = typename Lanes<T>::Sums{} + T(__builtin_nanf(""));
          continue;
        }
        const S* key = metric + keys[group + lane] * job.row_stride + begin;
        if (values == kLanes) {
          widen_row(row, key, kLanes);
        } else {
          widen_row(row, key, values);
        }
        __builtin_memcpy(&square[lane], row, sizeof row);
      }
      transpose<typename Lanes<T>::Sums, typename Lanes<T>::Mask>(square);
      for (int64_t c = 0; c < values; ++c) {
        __builtin_memcpy(panel + (begin + c) * width + group, &square[c], sizeof square[c]);
      }
    }
  }
}

// `keys` and `rows` hold the scratch that assign_scratch says, `best` one number a token to assign.
template <class S>
static void assign_typed(const AssignJob& job, Sum<S>* keys, Sum<S>* rows, float* best) {
  using T = Sum<S>;
  constexpr int64_t kLanes = Lanes<T>::kCount, kWidth = 2 * kLanes;
  const S* metric = static_cast<const S*>(job.metric);
  for (int64_t n = 0; n < job.tokens; ++n) {
    best[n] = -__builtin_inff();
    job.assign[job.token[n]] = 0;
  }
  for (int64_t tile = 0; tile < job.count; tile += job.tile) {
    const int64_t tile_end = job.count - tile < job.tile ? job.count : tile + job.tile;
    for (int64_t j = tile; j < tile_end; j += kWidth) {
      const int64_t left = tile_end - j, width = left > kLanes ? kWidth : kLanes;
      pack_keys<S>(keys + (j - tile) * job.dim, job, job.keys + j, left < width ? left : width, width);
    }
    for (int64_t block = 0; block < job.tokens; block += kBlock) {
      const int64_t there = job.tokens - block < kBlock ? job.tokens - block : kBlock;
      for (int64_t r = 0; r < kBlock; ++r) {  // the last row again where there are no more
        const S* row = metric + job.token[block + (r < there ? r : there - 1)] * job.row_stride;
        for (int64_t chunk = 0; chunk < job.dim; chunk += kChunk) {
          const int64_t values = job.dim - chunk < kChunk ? job.dim - chunk : kChunk;
          widen_row(rows + chunk * kBlock + r * kChunk, row + chunk, values);
        }
      }
      Best<T> lanes;
      for (int r = 0; r < kBlock; ++r) {
        lanes.similarity[r] = typename Lanes<T>::Floats{} - __builtin_inff();
        lanes.slot[r] = typename Lanes<T>::Slots{};
      }
      for (int64_t j = tile; j < tile_end; j += kWidth) {
        const T* panel = keys + (j - tile) * job.dim;
        if (tile_end - j > kLanes) {
          meet<T, 2>(lanes, rows, panel, job.dim, static_cast<int32_t>(j));
        } else {
          meet<T, 1>(lanes, rows, panel, job.dim, static_cast<int32_t>(j));
        }
      }
      for (int64_t r = 0; r < there; ++r) {
        settle(lanes.similarity[r], lanes.slot[r], job.assign + job.token[block + r], best + block + r);
      }
    }
  }
}

static void assign(const AssignJob& job, void* keys, void* rows, float* best) {
  switch (job.dtype) {
    case Float::f32:
      return assign_typed<float>(job, static_cast<float*>(keys), static_cast<float*>(rows), best);
    case Float::f64:
      return assign_typed<double>(job, static_cast<double*>(keys), static_cast<double*>(rows), best);
    case Float::bf16:
      return assign_typed<Bf16>(job, static_cast<float*>(keys), static_cast<float*>(rows), best);
    default:
      return assign_typed<Fp16>(job, static_cast<float*>(keys), static_cast<float*>(rows), best);
  }
}

// sum_c (x[c] - mean[c]) * grad[c], in 16 partial sums on every instruction set, then in pairs of them.
template <class T>
static inline Sum<T> away(const T* __restrict x, const T* __restrict mean, const T* __restrict grad, int64_t dim) {
  constexpr int kParts = 16;
  typedef Sum<T> Parts __attribute__((vector_size(kParts * sizeof(Sum<T>))));
  Parts parts = {};
  Sum<T> difference[kParts], slope[kParts];
  for (int64_t c = 0; c < dim; c += kParts) {
    const int64_t some = dim - c < kParts ? dim - c : kParts;
    if (some == kParts) {
      for (int p = 0; p < kParts; ++p) {
        difference[p] = widen(x[c + p]) - widen(mean[c + p]);
        slope[p] = widen(grad[c + p]);
      }
    } else {
      for (int p = 0; p < kParts; ++p) {
        difference[p] = p < some ? widen(x[c + p]) - widen(mean[c + p]) : Sum<T>{0};
        slope[p] = p < some ? widen(grad[c + p]) : Sum<T>{0};
      }
    }
    Parts d, g;
    __builtin_memcpy(&d, difference, sizeof d);
    __builtin_memcpy(&g, slope, sizeof g);
    parts += d * g;
  }
  for (int half = kParts / 2; half > 0; half /= 2) {
    for (int p = 0; p < half; ++p) {
      parts[p] += parts[p + half];
    }
  }
  return parts[0];
}

// to = scale * from. Streamed: past the caches, a line at a time, which spares reading what is overwritten.
template <class T>
static inline void scale_row(T* __restrict to, const T* __restrict from, Sum<T> scale, int64_t count, bool streamed) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  if (streamed) {
    for (int64_t c = 0; c < count; c += kLine) {
      alignas(64) T line[kLine];
      for (int64_t i = 0; i < kLine; ++i) {
        narrow(scale * widen(from[c + i]), line + i);
      }
      stream_line(to + c, line);
    }
    return;
  }
  for (int64_t c = 0; c < count; ++c) {
    narrow(scale * widen(from[c]), to + c);
  }
}

template <class T>
static void gradients_typed(const GradientJob& job, int64_t begin, int64_t end) {
  using S = Sum<T>;
  const S* size = static_cast<const S*>(job.size);
  const S* weight = static_cast<const S*>(job.weight);
  const S* grad_size = static_cast<const S*>(job.grad_size);
  T* dx = static_cast<T*>(job.dx);
  S* dweight = static_cast<S*>(job.dweight);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t b = at / job.tokens, i = at % job.tokens, j = job.assign[at];
    const bool live = j >= 0 && j < job.slots && size[b * job.slots + j] > 0;
    const int64_t slot = b * job.slots + j;
    const bool through_mean = live && job.grad.data != nullptr;
    const T* grad = static_cast<const T*>(job.grad.data) + (through_mean ? job.grad.at(b, j) : 0);
    if (dx != nullptr && through_mean) {
      const S scale = (weight == nullptr ? S{1} : weight[at]) / size[slot];
      scale_row(dx + at * job.dim, grad, scale, job.dim, job.streamed);
    } else if (dx != nullptr) {
      __builtin_memset(static_cast<void*>(dx + at * job.dim), 0, static_cast<size_t>(job.dim) * sizeof(T));
    }
    if (dweight == nullptr) {
      continue;
    }
    S d = 0;
    if (through_mean) {
      const T* x = static_cast<const T*>(job.x.data) + job.x.at(b, i);
      const T* mean = static_cast<const T*>(job.mean.data) + job.mean.at(b, j);
      d = away(x, mean, grad, job.dim) / size[slot];
    }
    dweight[at] = live && grad_size != nullptr ? d + grad_size[slot] : d;
  }
}

static void gradients(const GradientJob& job, int64_t begin, int64_t end) {
  switch (job.dtype) {
    case Float::f32:
      return gradients_typed<float>(job, begin, end);
    case Float::f64:
      return gradients_typed<double>(job, begin, end);
    case Float::bf16:
      return gradients_typed<Bf16>(job, begin, end);
    default:
      return gradients_typed<Fp16>(job, begin, end);
  }
}

static const MergeKernels kKernels = {assign, gradients, kBlock, 2 * Lanes<float>::kCount};
