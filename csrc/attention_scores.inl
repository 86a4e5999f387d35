// attention_scores, one (sample, head) at a time; the formulas are in sparsify_kernels/attention_scores/reference.py.
// Included once an instruction set, after vector.inl.
//
// A tile of queries meets all keys, kChunk of them at a time: its logits stay in the L2 cache between the passes over
// them, what a pass works on in L1.

#include "attention_scores_rows.inl"

template <class A, class O = A>
class Forward {
 public:
  template <class T>
  static void run(const AttentionForward& args, int64_t begin, int64_t end) {
    const int64_t slab = (args.in.queries + args.slabs - 1) / args.slabs;
    Forward work(args, slab);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t s = item % args.slabs, h = item / args.slabs % args.in.heads, b = item / args.slabs / args.in.heads;
      const int64_t first = smaller(s * slab, args.in.queries);  // the last slabs of very many queries may be empty
      work.template head<T>(b, h, first, smaller(first + slab, args.in.queries), item);
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
        received_(scratch_.take<double>(size_.keys)),
        queries_(scratch_.take<O>(size_.tile * size_.row)),
        output_(scratch_.take<A>(size_.tile * size_.value_dim)),
        logits_(scratch_.take<A>(size_.tile * size_.chunks * kChunk)),
        best_(scratch_.take<A>(size_.tile * size_.lanes)),
        total_(scratch_.take<A>(size_.tile * size_.lanes)),
        lost_(scratch_.take<A>(size_.tile * size_.lanes)),
        top_(scratch_.take<A>(size_.tile)),
        inverse_(scratch_.take<A>(size_.tile)),
        panels_(scratch_.take<O>(kept() * size_.depth)),
        values_(scratch_.take<O>(steps<O>(kept()) * size_.value_dim)),
        some_(scratch_.take<O>(size_.some())),
        weights_(scratch_.take<O>(kRounded ? size_.tile * steps<O>(kChunk) : 0)) {}

  static constexpr bool kRounded = !kSame<O, A>;  // the probabilities are, before they meet the values

  // Keys whose packed form there is room for.
  int64_t kept() const {
    return keep_ ? size_.keys : kChunk;
  }

  // What the constructor takes, with room for rounding each piece up.
  int64_t bytes() const {
    static_assert(sizeof(O) == sizeof(A));
    const int64_t numbers = size_.keys + size_.tile * (size_.row + size_.value_dim + size_.chunks * kChunk) +
                            size_.tile * (3 * size_.lanes + 2) + kept() * size_.depth +
                            steps<O>(kept()) * size_.value_dim + size_.some() +
                            (kRounded ? size_.tile * steps<O>(kChunk) : 0);
    return numbers * static_cast<int64_t>(sizeof(A)) + (in_.queries + in_.keys + size_.keys) * 8 + 16 * 64;
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
    const Rows<T> q = rows_of<T>(in_.q, b, h, in_.dim, query_index_, last);
    const Rows<T> k = rows_of<T>(in_.k, b, h, in_.dim, key_index_, key_count);
    const Rows<T> v = rows_of<T>(in_.v, b, h, in_.v.data == nullptr ? 0 : in_.value_dim, key_index_, key_count);
    if constexpr (kRounded) {
      if (has_small_values(q, first) || has_small_values(k, 0) || has_small_values(v, 0)) {
        return Forward<A>::template run<T>(args_, item, item + 1);
      }
    }
    if (last - first < end - begin || key_count == 0) {
      narrow_zeros(output + begin * in_.value_dim, (end - begin) * in_.value_dim);
      fill(lse + begin, end - begin, infinity);
    }
    keys_ = rounded_up(key_count, size_.lanes);
    fill(received_, keys_, 0.0);
    list_bias(in_.key_bias, b, key_index_, key_count, keys_, bias_);
    packed_ = false;
    for (int64_t i = first; i < last && key_count > 0; i += size_.tile) {
      const int64_t rows = smaller(size_.tile, last - i);
      pack_rows(q, i, i + rows, queries_, size_.row);
      logits(rows, k);
      tops(rows);
      probabilities(rows, v);
      packed_ = keep_;
      for (int64_t r = 0; r < rows; ++r) {
        const double sum = sum_in_double(total_ + r * size_.lanes) + sum_in_double(lost_ + r * size_.lanes);
        inverse_[r] = top_[r] == -infinity ? A{0} : static_cast<A>(1 / sum);
        lse[query_index_[i + r]] = top_[r] == -infinity ? infinity : top_[r] + logarithm(static_cast<A>(sum));
        if (v.width > 0) {
          narrow_row(output_ + r * size_.value_dim, inverse_[r], v.width, output + query_index_[i + r] * in_.value_dim);
        }
      }
      receive(rows);
    }
    write_sums(static_cast<A*>(args_.received) + item * in_.keys, in_.keys, received_, key_index_, key_count);
  }

  // The logits of the tile, and lane by lane the largest of each row.
  template <class T>
  void logits(int64_t rows, const Rows<T>& k) {
    fill(best_, rows * size_.lanes, -static_cast<A>(__builtin_inf()));
    const A scale = static_cast<A>(in_.scale);
    for (int64_t j = 0; j < keys_; j += kChunk) {
      const int64_t columns = smaller(kChunk, keys_ - j);
      O* panels = panels_ + (keep_ ? j * size_.depth : 0);
      A* logits = logits_ + j * size_.tile;
      if (!packed_) {
        pack_panels(k, j, columns, panels, some_);
        prefetch(k, j + columns, j + columns + kChunk);
      }
      multiply_panels(rows, columns, size_.depth, queries_, size_.row, panels, logits, bias_ + j, scale);
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
    fill(lost_, rows * size_.lanes, A{0});
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
        Vector<A> total = {};
        for (int64_t c = 0; c < columns; c += size_.lanes) {
          const Vector<A> e = exp_of<A>(load(row + c) - top);
          store(row + c, e);
          if constexpr (kRounded) {
            store_rounded(weights_ + r * steps<O>(kChunk) + steps<O>(c), e);
          }
          total += e;
        }
        add_exactly(total, total_ + r * size_.lanes, lost_ + r * size_.lanes);
      }
      if (v.width > 0) {
        if constexpr (kRounded) {
          attend(rows, j, columns, weights_, steps<O>(kChunk), v);
        } else {
          attend(rows, j, columns, chunk, kChunk, v);
        }
      }
    }
  }

  // Adds to the output the product of a chunk's weights, not yet divided by their sums, with its values.
  template <class T>
  void attend(int64_t rows, int64_t j, int64_t columns, const O* weights, int64_t weights_row, const Rows<T>& v) {
    // Rows far apart crowd the same sets of the cache: packed where they are read again for every tile.
    const O* values = keep_ && v.stride != v.width ? nullptr : in_place<O>(v, j, j + columns);
    const int64_t ld = values == nullptr ? size_.value_dim : v.stride;
    if (values == nullptr) {
      O* packed = values_ + (keep_ ? steps<O>(j) * size_.value_dim : 0);
      if (!packed_) {
        pack_steps(v, j, j + columns, packed, ld);
      }
      values = packed;
    }
    multiply<O, false>(rows, size_.value_dim / size_.lanes, steps<O>(columns), weights, weights_row, values, ld,
                       output_, size_.value_dim, Finish<A>{nullptr, A{1}, true});
  }

  // Adds the probabilities of the tile to what each key received.
  void receive(int64_t rows) {
    for (int64_t j = 0; j < keys_; j += kChunk) {
      add_up(rows, smaller(kChunk, keys_ - j), inverse_, logits_ + j * size_.tile, received_ + j);
    }
  }

  // sum += x, and to `lost` what rounding took from it (Knuth's two-sum): a large probability beside many small ones
  // would otherwise be rounded each time.
  static void add_exactly(Vector<A> x, A* sum, A* lost) {
    const Vector<A> before = load(sum), after = before + x, added = after - before;
    store(lost, load(lost) + ((before - (after - added)) + (x - added)));
    store(sum, after);
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
  const Sizes<A, O> size_;
  const bool keep_;  // packed keys and values are kept for the next tile
  Scratch scratch_;
  int64_t *query_index_, *key_index_;
  A* bias_;
  double* received_;
  O* queries_;
  A *output_, *logits_, *best_, *total_, *lost_, *top_, *inverse_;
  O *panels_, *values_, *some_, *weights_;
  int64_t keys_ = 0;  // valid ones, filled up to whole vectors
  bool packed_ = false;
};
