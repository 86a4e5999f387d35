// What attention_scores and its backward work on: the valid rows of one (sample, head), packed for the products. No
// others are, so that what stands at invalid positions is never read. Included once an instruction set, by
// attention_scores.inl.
//
// Sums are of type A. The products take operands of type O: numbers of type A, or what attention_scores_pairs.inl says.

constexpr int64_t kChunk = 64;
constexpr int64_t kTileRows = 48;
constexpr int64_t kTileBytes = 3 << 19;  // what the logits of a tile may take, unless there are very many keys

inline int64_t rounded_up(int64_t count, int64_t unit) {
  return (count + unit - 1) / unit * unit;
}

inline int64_t smaller(int64_t one, int64_t other) {
  return one < other ? one : other;
}

// Queries in a tile whose rows take `row_bytes`: from the shape alone, since the rounding of sums depends on it.
inline int64_t tile_rows(int64_t queries, int64_t row_bytes) {
  int64_t rows = kTileRows;
  while (rows > kBlockRows && rows * row_bytes > kTileBytes) {
    rows -= kBlockRows;
  }
  return rows < queries ? rows : queries;
}

// The rows of one (sample, head) that take part.
template <class T>
struct Rows {
  const T* data;
  int64_t stride, column, width;
  const int64_t* index;
  int64_t count;

  const T* at(int64_t i) const {
    return data + index[i] * stride;
  }
};

template <class T>
inline Rows<T> rows_of(const Heads& x, int64_t b, int64_t h, int64_t width, const int64_t* index, int64_t count) {
  return {static_cast<const T*>(x.data) + b * x.batch + h * x.head, x.row, x.column, width, index, count};
}

template <class T, class A>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// Rows begin..end where they lie, if they can serve as packed ones with a row stride of their own; else null.
template <class O, class T>
inline const O* in_place(const Rows<T>& from, int64_t begin, int64_t end) {
  if constexpr (kSame<T, O>) {
    const bool fits = from.column == 1 && from.width % Lanes<O>::width == 0 && end <= from.count;
    if (fits && from.index[end - 1] - from.index[begin] == end - 1 - begin) {
      return from.at(begin);
    }
  }
  return nullptr;
}

// Asks for rows begin..end, which the next step reads for the first time.
template <class T>
inline void prefetch(const Rows<T>& rows, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < smaller(end, rows.count); ++i) {
    const char* row = reinterpret_cast<const char*>(rows.at(i));
    for (int64_t byte = 0; byte < rows.width * static_cast<int64_t>(sizeof(T)); byte += 64) {
      __builtin_prefetch(row + byte, 0, 2);
    }
  }
}

// Positions 0..length of sample b that are valid; returns how many.
inline int64_t list_valid(const Table& valid, int64_t b, int64_t length, int64_t* index) {
  const bool* flags = static_cast<const bool*>(valid.data) + b * valid.batch;
  int64_t count = 0;
  for (int64_t i = 0; i < length; ++i) {
    if (valid.data == nullptr || flags[i * valid.column]) {
      index[count++] = i;
    }
  }
  return count;
}

// Rows begin..end to [end - begin, ld], zeros beyond the width and the last row.
template <class T, class A>
inline void pack_rows(const Rows<T>& from, int64_t begin, int64_t end, A* to, int64_t ld) {
  for (int64_t i = begin; i < end; ++i, to += ld) {
    const int64_t there = i < from.count ? from.width : 0;
    if (there > 0) {
      widen_row(from.at(i), from.column, there, to);
    }
    fill(to + there, ld - there, A{0});
  }
}

// Rows begin..end as the depth of a product, in steps of ld operands; what lies beyond is as in pack_rows.
template <class T, class A>
inline void pack_steps(const Rows<T>& from, int64_t begin, int64_t end, A* to, int64_t ld) {
  pack_rows(from, begin, end, to, ld);
}

// Rows begin..begin + columns as the columns of [steps, columns]; `some` holds as many rows as a vector has lanes.
template <class T, class O>
inline void pack_columns(const Rows<T>& from, int64_t begin, int64_t columns, O* to, O* some) {
  constexpr int width = Lanes<O>::width;
  const int64_t depth = steps<O>(from.width);
  for (int64_t j = 0; j < columns; j += width) {
    const O* rows = in_place<O>(from, begin + j, begin + j + width);
    const int64_t ld = rows == nullptr ? rounded_up(depth, width) : from.stride;
    if (rows == nullptr) {
      pack_rows(from, begin + j, begin + j + width, some, ld);
      rows = some;
    }
    for (int64_t d = 0; d < depth; d += width) {
      transpose_square<O>(rows + d, ld, to + d * columns + j, columns, depth - d);
    }
  }
}

// Keys, as many vectors wide as a block of the product; the last panel may be narrower.
template <class A>
constexpr int64_t kPanel = kBlockVectors * Lanes<A>::width;

// [rows, keys of the chunk] = left [rows, depth] times the chunk's panels, by `factor`, plus the addend of each key.
// Long sums are made of short ones: added up one by one, their terms would be rounded more and more. Where keys are
// few, parts of 64 err twice as much as PyTorch does; of 16 they err as much.
template <class O>
inline void multiply_panels(int64_t rows, int64_t keys, int64_t depth, const O* left, int64_t left_row, const O* panels,
                            Sum<O>* to, const Sum<O>* addend, Sum<O> factor) {
  for (int64_t j = 0; j < keys; j += kPanel<O>) {
    const int64_t columns = keys - j < kPanel<O> ? keys - j : kPanel<O>;
    const int64_t some = columns == Lanes<O>::width ? 16 : 64;
    int64_t k = 0;
    do {  // once where there is no depth, too: the addend is written all the same
      multiply<O, false>(rows, columns / Lanes<O>::width, smaller(some, depth - k), left + k, left_row,
                         panels + j * depth + k * columns, columns, to + j, kChunk,
                         Finish<Sum<O>>{k + some < depth ? nullptr : addend + j, factor, k > 0});
      k += some;
    } while (k < depth);
  }
}

// to[columns] += the rows of a chunk, each by its factor. A few rows at a time, and those sums in fp64: added one after
// the other, equal rows would all be rounded the same way.
template <class A>
inline void add_up(int64_t rows, int64_t columns, const A* factors, const A* chunk, double* to) {
  constexpr int64_t kFew = 8;
  for (int64_t i = 0; i < rows; i += kFew) {
    A sum[kChunk] = {};
    multiply<A, false>(1, columns / Lanes<A>::width, smaller(kFew, rows - i), factors + i, 0, chunk + i * kChunk,
                       kChunk, sum, 0, Finish<A>{nullptr, A{1}, true});
    for (int64_t c = 0; c < columns; ++c) {
      to[c] += static_cast<double>(sum[c]);
    }
  }
}

// One number for each of `keys` keys: sums of the valid ones, zeros for the others.
template <class A>
inline void write_sums(A* to, int64_t keys, const double* sums, const int64_t* index, int64_t count) {
  if (count < keys) {
    fill(to, keys, A{0});
  }
  for (int64_t j = 0; j < count; ++j) {
    to[index[j]] = static_cast<A>(sums[j]);
  }
}

template <class A>
inline double sum_in_double(const A* lanes) {
  double sum = 0;
  for (int64_t i = 0; i < Lanes<A>::width; ++i) {
    sum += static_cast<double>(lanes[i]);
  }
  return sum;
}

template <class T, class O>
inline void pack_panels(const Rows<T>& from, int64_t begin, int64_t keys, O* panels, O* some) {
  for (int64_t j = 0; j < keys; j += kPanel<O>) {
    const int64_t columns = keys - j < kPanel<O> ? keys - j : kPanel<O>;
    pack_columns(from, begin + j, columns, panels + j * steps<O>(from.width), some);
  }
}

// Bias of the valid keys, -inf for those that only fill a vector up.
template <class A>
inline void list_bias(const Table& bias, int64_t b, const int64_t* index, int64_t count, int64_t padded, A* to) {
  const A* from = static_cast<const A*>(bias.data) + b * bias.batch;
  for (int64_t j = 0; j < count; ++j) {
    to[j] = bias.data == nullptr ? A{0} : from[index[j] * bias.column];
  }
  fill(to + count, padded - count, -static_cast<A>(__builtin_inf()));
}

// The sizes that scratch memory follows from. A row of `dim` numbers is multiplied in `depth` steps, and packed in
// `row` operands; one of values likewise.
template <class A, class O>
struct Sizes {
  static constexpr int64_t lanes = Lanes<A>::width;
  int64_t keys, dim, value_dim, depth, value_depth, row, value_row, chunks, tile;

  Sizes(const AttentionInputs& in, int64_t queries, int64_t tables)
      : keys(rounded_up(in.keys, lanes)),
        dim(rounded_up(in.dim, lanes)),
        value_dim(rounded_up(in.value_dim, lanes)),
        depth(steps<O>(in.dim)),
        value_depth(steps<O>(in.value_dim)),
        row(rounded_up(depth, lanes)),
        value_row(rounded_up(value_depth, lanes)),
        chunks((in.keys + kChunk - 1) / kChunk),
        tile(tile_rows(queries, tables * keys * static_cast<int64_t>(sizeof(A)))) {}

  int64_t some() const {
    return lanes * (row > value_row ? row : value_row);
  }
};
