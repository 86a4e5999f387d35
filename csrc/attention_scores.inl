// attention_scores and its backward, one (sample, head) at a time; the formulas are in
// sparsify_kernels/attention_scores/reference.py. Included once an instruction set, after vector.inl.
//
// Only valid rows are packed, so that what stands at invalid positions is never read. A tile of queries meets all keys,
// kChunk of them at a time: its logits stay in the L2 cache between the passes over them, what a pass works on in L1.

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
template <class A, class T>
inline const A* in_place(const Rows<T>& from, int64_t begin, int64_t end) {
  if constexpr (kSame<T, A>) {
    const bool fits = from.column == 1 && from.width % Lanes<A>::width == 0 && end <= from.count;
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

// Rows begin..begin + columns as the columns of [width, columns]; `some` holds as many rows as a vector has lanes.
template <class T, class A>
inline void pack_columns(const Rows<T>& from, int64_t begin, int64_t columns, A* to, A* some) {
  constexpr int width = Lanes<A>::width;
  for (int64_t j = 0; j < columns; j += width) {
    const A* rows = in_place<A>(from, begin + j, begin + j + width);
    const int64_t ld = rows == nullptr ? rounded_up(from.width, width) : from.stride;
    if (rows == nullptr) {
      pack_rows(from, begin + j, begin + j + width, some, ld);
      rows = some;
    }
    for (int64_t d = 0; d < from.width; d += width) {
      transpose_square<A>(rows + d, ld, to + d * columns + j, columns, from.width - d);
    }
  }
}

// Keys, as many vectors wide as a block of the product; the last panel may be narrower.
template <class A>
constexpr int64_t kPanel = kBlockVectors * Lanes<A>::width;

// [rows, keys of the chunk] = left [rows, depth] times the chunk's panels, by `factor`, plus the addend of each key.
template <class A>
inline void multiply_panels(int64_t rows, int64_t keys, int64_t depth, const A* left, int64_t left_row, const A* panels,
                            A* to, const A* addend, A factor) {
  for (int64_t j = 0; j < keys; j += kPanel<A>) {
    const int64_t columns = keys - j < kPanel<A> ? keys - j : kPanel<A>;
    multiply<A, false>(rows, columns / Lanes<A>::width, depth, left, left_row, panels + j * depth, columns, to + j,
                       kChunk, Finish<A>{addend + j, factor});
  }
}

// to[columns] += the rows of a chunk, each by its factor. A few rows at a time, then those sums, then chunks: added one
// after the other, equal rows would all be rounded the same way.
template <class A>
inline void add_up(int64_t rows, int64_t columns, const A* factors, const A* chunk, A* to) {
  constexpr int64_t kFew = 8;
  A sum[kChunk] = {};
  for (int64_t i = 0; i < rows; i += kFew) {
    multiply<A, false>(1, columns / Lanes<A>::width, smaller(kFew, rows - i), factors + i, 0, chunk + i * kChunk,
                       kChunk, sum, 0, Finish<A>{nullptr, A{1}});
  }
  for (int64_t c = 0; c < columns; ++c) {
    to[c] += sum[c];
  }
}

template <class T, class A>
inline void pack_panels(const Rows<T>& from, int64_t begin, int64_t keys, A* panels, A* some) {
  for (int64_t j = 0; j < keys; j += kPanel<A>) {
    const int64_t columns = keys - j < kPanel<A> ? keys - j : kPanel<A>;
    pack_columns(from, begin + j, columns, panels + j * from.width, some);
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

// The sizes that scratch memory follows from.
template <class A>
struct Sizes {
  static constexpr int64_t lanes = Lanes<A>::width;
  int64_t keys, dim, value_dim, chunks, tile;

  Sizes(const AttentionInputs& in, int64_t queries, int64_t tables)
      : keys(rounded_up(in.keys, lanes)),
        dim(rounded_up(in.dim, lanes)),
        value_dim(rounded_up(in.value_dim, lanes)),
        chunks((in.keys + kChunk - 1) / kChunk),
        tile(tile_rows(queries, tables * keys * static_cast<int64_t>(sizeof(A)))) {}

  int64_t some() const {
    return lanes * (dim > value_dim ? dim : value_dim);
  }
};

template <class A>
class Forward {
 public:
  template <class T>
  static void run(const AttentionForward& args, int64_t begin, int64_t end) {
    const int64_t slab = (args.in.queries + args.slabs - 1) / args.slabs;
    Forward work(args, slab);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t s = item % args.slabs, h = item / args.slabs % args.in.heads, b = item / args.slabs / args.in.heads;
      work.template head<T>(b, h, s * slab, smaller((s + 1) * slab, args.in.queries), item);
    }
  }

 private:
  Forward(const AttentionForward& args, int64_t slab)
      : args_(args),
        in_(args.in),
        size_(in_, slab, 1),
        keep_(slab > size_.tile),
        scratch_(bytes()),
        query_index_(scratch_.take<int64_t>(in_.queries)),
        key_index_(scratch_.take<int64_t>(in_.keys)),
        bias_(scratch_.take<A>(size_.keys)),
        received_(scratch_.take<A>(size_.keys)),
        queries_(scratch_.take<A>(size_.tile * size_.dim)),
        output_(scratch_.take<A>(size_.tile * size_.value_dim)),
        logits_(scratch_.take<A>(size_.tile * size_.chunks * kChunk)),
        best_(scratch_.take<A>(size_.tile * size_.lanes)),
        total_(scratch_.take<A>(size_.tile * size_.lanes)),
        top_(scratch_.take<A>(size_.tile)),
        inverse_(scratch_.take<A>(size_.tile)),
        panels_(scratch_.take<A>((keep_ ? size_.keys : kChunk) * in_.dim)),
        values_(scratch_.take<A>((keep_ ? size_.keys : kChunk) * size_.value_dim)),
        some_(scratch_.take<A>(size_.some())) {}

  // What the constructor takes, with room for rounding each piece up.
  int64_t bytes() const {
    const int64_t kept = keep_ ? size_.keys : kChunk;
    const int64_t numbers = 2 * size_.keys + size_.tile * (size_.dim + size_.value_dim + size_.chunks * kChunk) +
                            size_.tile * (2 * size_.lanes + 2) + kept * (in_.dim + size_.value_dim) + size_.some();
    return numbers * static_cast<int64_t>(sizeof(A)) + (in_.queries + in_.keys) * 8 + 14 * 64;
  }

  // The valid ones among queries begin..end of one head; its received attention goes to row `item`.
  template <class T>
  void head(int64_t b, int64_t h, int64_t begin, int64_t end, int64_t item) {
    const A infinity = static_cast<A>(__builtin_inf());
    const int64_t head = b * in_.heads + h;
    T* output = static_cast<T*>(args_.output) + head * in_.queries * in_.value_dim;
    A* lse = static_cast<A*>(args_.lse) + head * in_.queries;
    const int64_t key_count = list_valid(in_.key_valid, b, in_.keys, key_index_);
    const int64_t first = list_valid(in_.query_valid, b, begin, query_index_);
    const int64_t last = list_valid(in_.query_valid, b, end, query_index_);
    if (last - first < end - begin || key_count == 0) {
      narrow_zeros(output + begin * in_.value_dim, (end - begin) * in_.value_dim);
      fill(lse + begin, end - begin, infinity);
    }
    keys_ = rounded_up(key_count, size_.lanes);
    fill(received_, keys_, A{0});
    list_bias(in_.key_bias, b, key_index_, key_count, keys_, bias_);
    const Rows<T> q = rows_of<T>(in_.q, b, h, in_.dim, query_index_, last);
    const Rows<T> k = rows_of<T>(in_.k, b, h, in_.dim, key_index_, key_count);
    const Rows<T> v = rows_of<T>(in_.v, b, h, in_.v.data == nullptr ? 0 : in_.value_dim, key_index_, key_count);
    packed_ = false;
    for (int64_t i = first; i < last && key_count > 0; i += size_.tile) {
      const int64_t rows = smaller(size_.tile, last - i);
      pack_rows(q, i, i + rows, queries_, size_.dim);
      logits(rows, k);
      tops(rows);
      probabilities(rows, v);
      packed_ = keep_;
      for (int64_t r = 0; r < rows; ++r) {
        const A sum = top_[r] == -infinity ? A{0} : sum_of<A>(load(total_ + r * size_.lanes));
        inverse_[r] = top_[r] == -infinity ? A{0} : 1 / sum;
        lse[query_index_[i + r]] = top_[r] == -infinity ? infinity : top_[r] + logarithm(sum);
        if (v.width > 0) {
          narrow_row(output_ + r * size_.value_dim, inverse_[r], v.width, output + query_index_[i + r] * in_.value_dim);
        }
      }
      receive(rows);
    }
    A* received = static_cast<A*>(args_.received) + item * in_.keys;
    if (key_count < in_.keys) {
      fill(received, in_.keys, A{0});
    }
    for (int64_t j = 0; j < key_count; ++j) {
      received[key_index_[j]] = received_[j];
    }
  }

  // The logits of the tile, and lane by lane the largest of each row.
  template <class T>
  void logits(int64_t rows, const Rows<T>& k) {
    fill(best_, rows * size_.lanes, -static_cast<A>(__builtin_inf()));
    const A scale = static_cast<A>(in_.scale);
    for (int64_t j = 0; j < keys_; j += kChunk) {
      const int64_t columns = smaller(kChunk, keys_ - j);
      A* panels = panels_ + (keep_ ? j * in_.dim : 0);
      A* logits = logits_ + j * size_.tile;
      if (!packed_) {
        pack_panels(k, j, columns, panels, some_);
        prefetch(k, j + columns, j + columns + kChunk);
      }
      multiply_panels(rows, columns, in_.dim, queries_, size_.dim, panels, logits, bias_ + j, scale);
      for (int64_t r = 0; r < rows; ++r) {
        Vector<A> best = load(best_ + r * size_.lanes);
        for (int64_t c = 0; c < columns; c += size_.lanes) {
          best = larger<A>(load(logits + r * kChunk + c), best);
        }
        store(best_ + r * size_.lanes, best);
      }
    }
  }

  // The largest logit of each row; -inf where no key is seen. A row of nothing but -inf and NaN is not such a row.
  void tops(int64_t rows) {
    const A infinity = static_cast<A>(__builtin_inf());
    for (int64_t r = 0; r < rows; ++r) {
      top_[r] = largest_of<A>(load(best_ + r * size_.lanes));
      for (int64_t j = 0; j < keys_ && top_[r] == -infinity; ++j) {
        const A logit = logits_[j / kChunk * kChunk * size_.tile + r * kChunk + j % kChunk];
        top_[r] = logit == logit ? top_[r] : A{0};
      }
    }
  }

  // exp(logit - top) in place of the logits, their sums lane by lane, and their product with the values.
  template <class T>
  void probabilities(int64_t rows, const Rows<T>& v) {
    const A infinity = static_cast<A>(__builtin_inf());
    fill(total_, rows * size_.lanes, A{0});
    fill(output_, rows * size_.value_dim, A{0});
    for (int64_t j = 0; j < keys_; j += kChunk) {
      const int64_t columns = smaller(kChunk, keys_ - j);
      A* chunk = logits_ + j * size_.tile;
      if (!packed_) {
        prefetch(v, j, j + columns);
      }
      for (int64_t r = 0; r < rows; ++r) {
        A* row = chunk + r * kChunk;
        const A top = top_[r] == -infinity ? A{0} : top_[r];  // exp(-inf - 0) is 0, too
        Vector<A> total = load(total_ + r * size_.lanes);
        for (int64_t c = 0; c < columns; c += size_.lanes) {
          const Vector<A> e = exp_of<A>(load(row + c) - top);
          store(row + c, e);
          total += e;
        }
        store(total_ + r * size_.lanes, total);
      }
      if (v.width > 0) {
        // Rows far apart crowd the same sets of the cache: packed where they are read again for every tile.
        const A* values = keep_ && v.stride != v.width ? nullptr : in_place<A>(v, j, j + columns);
        const int64_t ld = values == nullptr ? size_.value_dim : v.stride;
        if (values == nullptr) {
          A* packed = values_ + (keep_ ? j * size_.value_dim : 0);
          if (!packed_) {
            pack_rows(v, j, j + columns, packed, ld);
          }
          values = packed;
        }
        multiply<A, false>(rows, size_.value_dim / size_.lanes, columns, chunk, kChunk, values, ld, output_,
                           size_.value_dim, Finish<A>{nullptr, A{1}});
      }
    }
  }

  // Adds the probabilities of the tile to what each key received.
  void receive(int64_t rows) {
    for (int64_t j = 0; j < keys_; j += kChunk) {
      add_up(rows, smaller(kChunk, keys_ - j), inverse_, logits_ + j * size_.tile, received_ + j);
    }
  }

  static float logarithm(float x) {
    return __builtin_logf(x);
  }
  static double logarithm(double x) {
    return __builtin_log(x);
  }

  template <class T>
  static void narrow_zeros(T* to, int64_t count) {
    if (count > 0) {  // an empty tensor has no address
      __builtin_memset(static_cast<void*>(to), 0, static_cast<size_t>(count) * sizeof(T));
    }
  }

  const AttentionForward& args_;
  const AttentionInputs& in_;
  const Sizes<A> size_;
  const bool keep_;  // packed keys and values are kept for the next tile
  Scratch scratch_;
  int64_t *query_index_, *key_index_;
  A *bias_, *received_, *queries_, *output_, *logits_, *best_, *total_, *top_, *inverse_, *panels_, *values_, *some_;
  int64_t keys_ = 0;  // valid ones, filled up to whole vectors
  bool packed_ = false;
};
