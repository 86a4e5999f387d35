// The backward of attention_scores, one (sample, head) at a time; the formulas are in
// sparsify_kernels/attention_scores/reference.py. Included once an instruction set, after attention_scores.inl.
//
// A tile of queries is done in two passes over the keys: the first rebuilds exp(logit - lse) and the gradient of the
// probabilities and sums up each row, the second has the row sums and does the products. Dividing by the row's own
// sum takes the rounding of lse out again.
//
// Operands of type O as in the forward. The product that gives dq takes sums of type A: the gradients of a row's logits
// add up to 0, so that what its keys have in common cancels, and with rounded ones it would not.

template <class A, class O = A>
class Backward {
 public:
  template <class T>
  static void run(const AttentionBackward& args, int64_t begin, int64_t end) {
    Backward work(args);
    for (int64_t item = begin; item < end; ++item) {
      work.template head<T>(item / args.in.heads, item % args.in.heads);
    }
  }

 private:
  explicit Backward(const AttentionBackward& args)
      : args_(args),
        in_(args.in),
        size_(in_, in_.queries, 2),
        scratch_(bytes()),
        query_index_(scratch_.take<int64_t>(in_.queries)),
        key_index_(scratch_.take<int64_t>(in_.keys)),
        bias_(scratch_.take<A>(size_.keys)),
        grad_keys_(scratch_.take<A>(size_.keys)),
        grad_bias_(scratch_.take<double>(size_.keys)),
        queries_(scratch_.take<O>(size_.tile * size_.row)),
        query_steps_(kRounded ? scratch_.take<O>(steps<O>(size_.tile) * size_.dim) : queries_),
        grad_queries_(scratch_.take<A>(size_.tile * size_.dim)),
        grad_rows_(scratch_.take<O>(size_.tile * size_.value_row)),
        grad_steps_(kRounded ? scratch_.take<O>(steps<O>(size_.tile) * size_.value_dim) : grad_rows_),
        weights_(scratch_.take<A>(size_.tile * size_.chunks * kChunk)),
        grads_(scratch_.take<A>(size_.tile * size_.chunks * kChunk)),
        total_(scratch_.take<A>(size_.tile * size_.lanes)),
        mean_(scratch_.take<A>(size_.tile * size_.lanes)),
        ones_(scratch_.take<A>(size_.tile)),
        key_panels_(scratch_.take<O>(size_.keys * size_.depth)),
        value_panels_(scratch_.take<O>(size_.keys * size_.value_depth)),
        key_rows_(scratch_.take<A>(size_.keys * size_.dim)),
        grad_key_rows_(scratch_.take<A>(size_.keys * size_.dim)),
        grad_value_rows_(scratch_.take<A>(size_.keys * size_.value_dim)),
        some_(scratch_.take<O>(size_.some())),
        rounded_(scratch_.take<O>(kRounded ? steps<O>(size_.tile) * kChunk : 0)) {
    fill(ones_, size_.tile, A{1});
  }

  static constexpr bool kRounded = !kSame<O, A>;  // probabilities and gradients of logits are, but for dq

  // What the constructor takes, with room for rounding each piece up.
  int64_t bytes() const {
    static_assert(sizeof(O) == sizeof(A));
    const int64_t rounded = kRounded ? steps<O>(size_.tile) * (size_.dim + size_.value_dim + kChunk) : 0;
    const int64_t numbers = size_.keys * (2 + size_.depth + size_.value_depth + 2 * size_.dim + size_.value_dim) +
                            size_.tile * (size_.row + size_.dim + size_.value_row + 2 * size_.chunks * kChunk) +
                            size_.tile * (2 * size_.lanes + 1) + size_.some() + rounded;
    return numbers * static_cast<int64_t>(sizeof(A)) + (in_.queries + in_.keys + size_.keys) * 8 + 22 * 64;
  }

  template <class T>
  void head(int64_t b, int64_t h) {
    const int64_t head = b * in_.heads + h;
    T* dq = static_cast<T*>(args_.dq) + (args_.dq == nullptr ? 0 : head * in_.queries * in_.dim);
    T* dk = static_cast<T*>(args_.dk) + (args_.dk == nullptr ? 0 : head * in_.keys * in_.dim);
    T* dv = static_cast<T*>(args_.dv) + (args_.dv == nullptr ? 0 : head * in_.keys * in_.value_dim);
    const int64_t key_count = list_valid(in_.key_valid, b, in_.keys, key_index_);
    const int64_t share_of = list_valid(in_.query_valid, b, in_.queries, query_index_);
    const A* lse = static_cast<const A*>(args_.lse.data) + b * args_.lse.batch + h * args_.lse.head;
    const int64_t query_count = list_live(lse, share_of);
    const Rows<T> q = rows_of<T>(in_.q, b, h, in_.dim, query_index_, query_count);
    const Rows<T> k = rows_of<T>(in_.k, b, h, in_.dim, key_index_, key_count);
    const bool values = in_.v.data != nullptr && args_.grad_output.data != nullptr;
    const Rows<T> v = rows_of<T>(in_.v, b, h, values ? in_.value_dim : 0, key_index_, key_count);
    const Rows<T> g = rows_of<T>(args_.grad_output, b, h, v.width, query_index_, query_count);
    if constexpr (kRounded) {
      if (has_small_values(q, 0) || has_small_values(k, 0) || has_small_values(v, 0) || has_small_values(g, 0)) {
        return Backward<A>::template run<T>(args_, head, head + 1);
      }
    }
    keys_ = rounded_up(key_count, size_.lanes);
    list_bias(in_.key_bias, b, key_index_, key_count, keys_, bias_);
    list_grad_received(b, key_count, A{1} / static_cast<A>(in_.heads * (share_of > 0 ? share_of : 1)));
    fill(grad_bias_, keys_, 0.0);
    fill(grad_key_rows_, keys_ * size_.dim, A{0});
    fill(grad_value_rows_, keys_ * size_.value_dim, A{0});

    if (dq != nullptr && (query_count < in_.queries || key_count == 0)) {
      __builtin_memset(static_cast<void*>(dq), 0, static_cast<size_t>(in_.queries * in_.dim) * sizeof(T));
    }
    for (int64_t i = 0; i < query_count && key_count > 0; i += size_.tile) {
      const int64_t rows = smaller(size_.tile, query_count - i);
      pack_rows(q, i, i + rows, queries_, size_.row);
      pack_rows(g, i, i + rows, grad_rows_, size_.value_row);
      if constexpr (kRounded) {
        pack_steps(q, i, i + rows, query_steps_, size_.dim);
        pack_steps(g, i, i + rows, grad_steps_, size_.value_dim);
      }
      rebuild(rows, i, lse, k, v, i == 0);
      row_sums(rows);
      products(rows, v.width > 0);
      for (int64_t r = 0; r < rows && dq != nullptr; ++r) {
        narrow_row(grad_queries_ + r * size_.dim, static_cast<A>(in_.scale), in_.dim,
                   dq + query_index_[i + r] * in_.dim);
      }
    }
    write_keys(dk, grad_key_rows_, size_.dim, in_.dim, static_cast<A>(in_.scale), key_count);
    write_keys(dv, grad_value_rows_, size_.value_dim, in_.value_dim, A{1}, key_count);
    if (args_.dkey_bias != nullptr) {
      write_sums(static_cast<A*>(args_.dkey_bias) + head * in_.keys, in_.keys, grad_bias_, key_index_, key_count);
    }
  }

  // Leaves the queries that see a key in query_index_; returns how many.
  int64_t list_live(const A* lse, int64_t count) {
    int64_t live = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (lse[query_index_[i] * args_.lse.row] != static_cast<A>(__builtin_inf())) {
        query_index_[live++] = query_index_[i];
      }
    }
    return live;
  }

  void list_grad_received(int64_t b, int64_t count, A share) {
    const Table& grad = args_.grad_received;
    const A* from = static_cast<const A*>(grad.data) + b * grad.batch;
    for (int64_t j = 0; j < count; ++j) {
      grad_keys_[j] = grad.data == nullptr ? A{0} : from[key_index_[j] * grad.column] * share;
    }
    fill(grad_keys_ + count, keys_ - count, A{0});
  }

  // weights_ = exp(logit - lse), grads_ = the gradient of P; lane by lane the sums of the weights and of both's
  // product.
  template <class T>
  void rebuild(int64_t rows, int64_t first, const A* lse, const Rows<T>& k, const Rows<T>& v, bool pack) {
    const A scale = static_cast<A>(in_.scale);
    fill(total_, rows * size_.lanes, A{0});
    fill(mean_, rows * size_.lanes, A{0});
    for (int64_t j = 0; j < keys_; j += kChunk) {
      const int64_t columns = smaller(kChunk, keys_ - j);
      A *weights = weights_ + j * size_.tile, *grads = grads_ + j * size_.tile;
      if (pack) {
        pack_panels(k, j, columns, key_panels_ + j * size_.depth, some_);
        pack_panels(v, j, columns, value_panels_ + j * size_.value_depth, some_);
        pack_rows(k, j, j + columns, key_rows_ + j * size_.dim, size_.dim);
      }
      multiply_panels(rows, columns, size_.depth, queries_, size_.row, key_panels_ + j * size_.depth, weights,
                      bias_ + j, scale);
      multiply_panels(rows, columns, steps<O>(v.width), grad_rows_, size_.value_row,
                      value_panels_ + j * size_.value_depth, grads, grad_keys_ + j, A{1});
      for (int64_t r = 0; r < rows; ++r) {
        const A top = lse[query_index_[first + r] * args_.lse.row];
        Vector<A> total = load(total_ + r * size_.lanes), mean = load(mean_ + r * size_.lanes);
        for (int64_t c = r * kChunk; c < r * kChunk + columns; c += size_.lanes) {
          const Vector<A> e = exp_of<A>(load(weights + c) - top);
          store(weights + c, e);
          total += e;
          mean += e * load(grads + c);
        }
        store(total_ + r * size_.lanes, total);
        store(mean_ + r * size_.lanes, mean);
      }
    }
  }

  // total_[r] = 1 / sum of the weights, mean_[r] = the mean of the gradient of P under P.
  void row_sums(int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const double total = sum_in_double(total_ + r * size_.lanes);
      const A inverse = static_cast<A>(1 / total);
      const A mean = static_cast<A>(sum_in_double(mean_ + r * size_.lanes) / total);
      total_[r] = inverse;
      mean_[r] = mean;
      if constexpr (!kRounded) {
        for (int64_t c = 0; c < size_.value_dim; ++c) {
          grad_rows_[r * size_.value_dim + c] *= inverse;  // so that the weights need no division
        }
      }
    }
  }

  // A chunk of [rows, columns] as the left operands of a product down its rows; rounded ones are of each row times its
  // factor, the others as they are.
  const O* transposed(int64_t rows, int64_t columns, const A* chunk, const A* factors) {
    if constexpr (kRounded) {
      for (int64_t r = 0; r < rows; r += 2) {
        const bool second = r + 1 < rows;
        for (int64_t c = 0; c < columns; c += size_.lanes) {
          const A* one = chunk + r * kChunk + c;
          store_rounded(rounded_ + steps<O>(r) * kChunk + c, load(one) * factors[r],
                        second ? load(one + kChunk) * factors[r + 1] : Vector<A>{});
        }
      }
      return rounded_;
    } else {
      return chunk;
    }
  }

  // grads_ becomes the gradient of the logits; what follows from it and from the weights is added up.
  void products(int64_t rows, bool values) {
    const Finish<A> add{nullptr, A{1}, true};
    const bool logits = args_.dq != nullptr || args_.dk != nullptr || args_.dkey_bias != nullptr;
    fill(grad_queries_, rows * size_.dim, A{0});
    for (int64_t j = 0; j < keys_; j += kChunk) {
      const int64_t columns = smaller(kChunk, keys_ - j);
      A *weights = weights_ + j * size_.tile, *grads = grads_ + j * size_.tile;
      if (values && args_.dv != nullptr) {
        multiply<O, true>(columns, size_.value_dim / size_.lanes, steps<O>(rows),
                          transposed(rows, columns, weights, total_), kChunk, grad_steps_, size_.value_dim,
                          grad_value_rows_ + j * size_.value_dim, size_.value_dim, add);
      }
      for (int64_t r = 0; r < rows && logits; ++r) {
        const A inverse = total_[r], mean = mean_[r];
        for (int64_t c = r * kChunk; c < r * kChunk + columns; c += size_.lanes) {
          store(grads + c, load(weights + c) * inverse * (load(grads + c) - mean));
        }
      }
      if (args_.dq != nullptr) {
        multiply<A, false>(rows, size_.dim / size_.lanes, columns, grads, kChunk, key_rows_ + j * size_.dim, size_.dim,
                           grad_queries_, size_.dim, add);
      }
      if (args_.dk != nullptr) {
        multiply<O, true>(columns, size_.dim / size_.lanes, steps<O>(rows), transposed(rows, columns, grads, ones_),
                          kChunk, query_steps_, size_.dim, grad_key_rows_ + j * size_.dim, size_.dim, add);
      }
      if (args_.dkey_bias != nullptr) {
        add_up(rows, columns, ones_, grads, grad_bias_ + j);
      }
    }
  }

  // Rows of valid keys, zeros for the others.
  template <class T>
  void write_keys(T* to, const A* from, int64_t ld, int64_t width, A factor, int64_t count) {
    if (to == nullptr) {
      return;
    }
    if (count < in_.keys) {
      __builtin_memset(static_cast<void*>(to), 0, static_cast<size_t>(in_.keys * width) * sizeof(T));
    }
    for (int64_t j = 0; j < count; ++j) {
      narrow_row(from + j * ld, factor, width, to + key_index_[j] * width);
    }
  }

  const AttentionBackward& args_;
  const AttentionInputs& in_;
  const Sizes<A, O> size_;
  Scratch scratch_;
  int64_t *query_index_, *key_index_;
  A *bias_, *grad_keys_;
  double* grad_bias_;
  O *queries_, *query_steps_;
  A* grad_queries_;
  O *grad_rows_, *grad_steps_;
  A *weights_, *grads_, *total_, *mean_, *ones_;
  O *key_panels_, *value_panels_;
  A *key_rows_, *grad_key_rows_, *grad_value_rows_;
  O *some_, *rounded_;
  int64_t keys_ = 0;  // valid ones, filled up to whole vectors
};
