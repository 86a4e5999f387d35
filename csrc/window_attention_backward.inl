// The backward of window_attention, one window of one head at a time; the formulas are in
// sparsify_kernels/window_attention/reference.py. Included once an instruction set, after window_attention.inl.
//
// A tile of queries rebuilds exp(logit - lse) and the gradient of the probabilities for all keys. Dividing by the
// row's own sum takes the rounding of lse out again.

constexpr int64_t kGradTileRows = 48;

template <class A>
class Backward {
 public:
  template <class T>
  static void run(const WindowBackward& args, int64_t begin, int64_t end) {
    Backward work(args);
    for (int64_t item = begin; item < end; ++item) {
      work.template slab<T>(item / args.in.heads, item % args.in.heads, item);
    }
  }

 private:
  static constexpr int64_t lanes = Lanes<A>::width;

  explicit Backward(const WindowBackward& args)
      : args_(args),
        in_(args.in),
        places_(in_),
        rows_(in_),
        most_(rounded_up(in_.most, lanes)),
        products_(args.dqkv != nullptr || args.dscale != nullptr),
        scratch_(bytes()),
        queries_(scratch_.take<A>(most_ * rows_.width())),
        keys_(scratch_.take<A>(most_ * rows_.width())),
        key_panel_(scratch_.take<A>(most_ * rows_.width())),
        values_(scratch_.take<A>(most_ * rows_.width())),
        value_panel_(scratch_.take<A>(most_ * rows_.width())),
        grad_rows_(scratch_.take<A>(most_ * rows_.width())),
        grad_keys_(scratch_.take<A>(most_ * rows_.width())),
        grad_values_(scratch_.take<A>(most_ * rows_.width())),
        grad_queries_(scratch_.take<A>(kGradTileRows * rows_.width())),
        weights_(scratch_.take<A>(kGradTileRows * most_)),
        grads_(scratch_.take<A>(kGradTileRows * most_)),
        row_(scratch_.take<A>(rows_.width())),
        query_norm_(scratch_.take<A>(most_)),
        query_inverse_(scratch_.take<A>(most_)),
        key_norm_(scratch_.take<A>(most_)),
        key_inverse_(scratch_.take<A>(most_)) {}

  // What the constructor takes, with room for rounding each piece up.
  int64_t bytes() const {
    const int64_t numbers = (8 * most_ + kGradTileRows + 1) * rows_.width() + 2 * kGradTileRows * most_ + 4 * most_;
    return numbers * static_cast<int64_t>(sizeof(A)) + 17 * 64;
  }

  template <class T>
  void slab(int64_t slab, int64_t h, int64_t item) {
    places_.begin_head(h);
    if (args_.dbias != nullptr) {
      places_.begin_pairs();
    }
    scale_sum_ = 0;
    for (int64_t w = in_.slab_begin(slab), last = in_.slab_begin(slab + 1); w < last; ++w) {
      if (places_.begin_window(w, w + 1 < last ? w + 1 : w) > 0) {
        window<T>(h);
      }
    }
    if (args_.dbias != nullptr) {
      places_.end_pairs(static_cast<A*>(args_.dbias) + item * in_.table());
    }
    if (args_.dscale != nullptr) {
      args_.dscale[item] = scale_sum_;
    }
  }

  template <class T>
  void window(int64_t h) {
    const int64_t count = places_.count(), width = rows_.width();
    factor_ = rows_.factor(h);
    read<T>(h);
    if (args_.dbias != nullptr) {
      places_.begin_pairs_of_window();
    }
    fill(grad_keys_, count * width, A{0});
    fill(grad_values_, count * width, A{0});
    const int64_t tiles = (count + kGradTileRows - 1) / kGradTileRows;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = count * t / tiles;
      tile<T>(begin, count * (t + 1) / tiles - begin, h);
    }
    for (int64_t i = 0; i < count && args_.dqkv != nullptr; ++i) {
      write<T>(1, i, h, grad_keys_ + i * width, keys_ + i * width, key_norm_, key_inverse_);
      write_row(grad_values_ + i * width, in_.dim, A{1}, gradient<T>(2, i, h));
    }
  }

  template <class T>
  void read(int64_t h) {
    rows_.template read<T>(in_.qkv, 0, h, places_, queries_);
    rows_.template read<T>(in_.qkv, 1, h, places_, keys_);
    rows_.template read<T>(in_.qkv, 2, h, places_, values_);
    rows_.template read<T>(args_.grad, 0, h, places_, grad_rows_);
    if (in_.cosine) {
      rows_.point(queries_, places_, query_norm_, query_inverse_);
      rows_.point(keys_, places_, key_norm_, key_inverse_);
    }
    rows_.turn(keys_, places_, key_panel_);
    rows_.turn(values_, places_, value_panel_);
  }

  template <class T>
  void tile(int64_t begin, int64_t rows, int64_t h) {
    const int64_t count = places_.count(), width = rows_.width(), padded = places_.padded();
    gradients_of_logits<T>(begin, rows, h);
    if (args_.dqkv != nullptr) {
      product<A, true>(count, width / lanes, rows, weights_, padded, grad_rows_ + begin * width, width, grad_values_,
                       width, true);
      product<A, true>(count, width / lanes, rows, grads_, padded, queries_ + begin * width, width, grad_keys_, width,
                       true);
    }
    for (int64_t i = 0; i < rows && args_.dbias != nullptr; ++i) {
      places_.add_pairs(begin + i, grads_ + i * padded);
    }
    if (!products_) {
      return;
    }
    product<A, false>(rows, width / lanes, count, grads_, padded, keys_, width, grad_queries_, width, false);
    for (int64_t i = 0; i < rows; ++i) {
      const A *grad = grad_queries_ + i * width, *query = queries_ + (begin + i) * width;
      if (args_.dscale != nullptr) {
        scale_sum_ += static_cast<double>(dot(grad, query));
      }
      if (args_.dqkv != nullptr) {
        write<T>(0, begin + i, h, grad, query, query_norm_, query_inverse_);
      }
    }
  }

  // weights_ = the probabilities, grads_ = the gradient of the logits; zeros beyond the last token.
  template <class T>
  void gradients_of_logits(int64_t begin, int64_t rows, int64_t h) {
    const int64_t padded = places_.padded(), width = rows_.width();
    for (int64_t i = 0; i < rows; ++i) {
      places_.next(begin + i, [&](int64_t token) {
        rows_.template expect<T>(in_.qkv, 3, h, token);
        rows_.template expect<T>(args_.grad, 1, h, token);
      });
      for (int64_t part = 0; part < 3 && args_.dqkv != nullptr; ++part) {
        rows_.expect(gradient<T>(part, begin + i, h));
      }
    }
    product<A, false>(rows, padded / lanes, in_.dim, queries_ + begin * width, width, key_panel_, padded, weights_,
                      padded, false);
    product<A, false>(rows, padded / lanes, in_.dim, grad_rows_ + begin * width, width, value_panel_, padded, grads_,
                      padded, false);
    for (int64_t i = 0; i < rows; i += kTogether<A>) {
      probabilities(begin, i, smaller(kTogether<A>, rows - i), h);
    }
  }

  // The same for a few rows from row i of the tile on, from their logits and the gradients of their probabilities.
  void probabilities(int64_t begin, int64_t i, int64_t rows, int64_t h) {
    const int64_t padded = places_.padded();
    Vector<A> total[kTogether<A>] = {}, mean[kTogether<A>] = {};
    A sum[kTogether<A>], middle[kTogether<A>];
    for (int64_t r = 0; r < rows; ++r) {
      A* weight = weights_ + (i + r) * padded;
      const A* grad = grads_ + (i + r) * padded;
      const A top = static_cast<const A*>(args_.lse)[places_.token(begin + i + r) * in_.heads + h];
      places_.logits(begin + i + r, factor_, weight);
      for (int64_t j = 0; j < padded; j += lanes) {
        const Vector<A> e = exp_of<A>(load(weight + j) - top);
        store(weight + j, e);
        total[r] += e;
        mean[r] += e * load(grad + j);
      }
    }
    together<A, Add<A>>(total, sum);
    together<A, Add<A>>(mean, middle);
    for (int64_t r = 0; r < rows; ++r) {  // where all gradients are alike, the mean's rounding is all there is
      A* grad = grads_ + (i + r) * padded;
      const A along = middle[r] / sum[r];
      mean[r] = Vector<A>{};
      for (int64_t j = 0; j < padded; j += lanes) {
        const Vector<A> apart = load(grad + j) - along;
        store(grad + j, apart);
        mean[r] += load(weights_ + (i + r) * padded + j) * apart;
      }
    }
    together<A, Add<A>>(mean, middle);
    for (int64_t r = 0; r < rows; ++r) {
      A *weight = weights_ + (i + r) * padded, *grad = grads_ + (i + r) * padded;
      const A inverse = 1 / sum[r], along = middle[r] * inverse;
      for (int64_t j = 0; j < padded; j += lanes) {
        const Vector<A> p = load(weight + j) * inverse;
        store(weight + j, p);
        store(grad + j, p * (load(grad + j) - along));
      }
      if (places_.count() == 1) {  // exactly: rounding would be all there is
        weight[0] = A{1};
        grad[0] = A{0};
      }
    }
  }

  // Where the gradient of a part of token i goes.
  template <class T>
  T* gradient(int64_t part, int64_t i, int64_t h) const {
    return static_cast<T*>(args_.dqkv) + ((places_.token(i) * 3 + part) * in_.heads + h) * in_.dim;
  }

  A dot(const A* one, const A* other) const {
    Vector<A> sum = {};
    for (int64_t c = 0; c < rows_.width(); c += lanes) {
      sum += load(one + c) * load(other + c);
    }
    return everywhere<A, Add<A>>(sum)[0];
  }

  // Token i's gradient of q or k from that of what the products took.
  template <class T>
  void write(int64_t part, int64_t i, int64_t h, const A* grad, const A* direction, const A* norm, const A* inverse) {
    T* to = gradient<T>(part, i, h);
    if (!in_.cosine) {
      return write_row(grad, in_.dim, factor_, to);
    }
    const bool turns = norm[i] > static_cast<A>(kSmallestNorm);
    if (turns && in_.dim == 1) {  // nowhere to turn to, exactly: rounding would be all there is
      return narrow(A{0}, *to);
    }
    const A along = turns ? dot(grad, direction) : A{0};
    for (int64_t c = 0; c < rows_.width(); c += lanes) {
      store(row_ + c, load(grad + c) - load(direction + c) * along);
    }
    write_row(row_, in_.dim, factor_ * inverse[i], to);
  }

  const WindowBackward& args_;
  const WindowInputs& in_;
  Places<A> places_;
  const Rows<A> rows_;
  const int64_t most_;
  const bool products_;
  Scratch scratch_;
  A *queries_, *keys_, *key_panel_, *values_, *value_panel_, *grad_rows_, *grad_keys_, *grad_values_, *grad_queries_;
  A *weights_, *grads_, *row_, *query_norm_, *query_inverse_, *key_norm_, *key_inverse_;
  A factor_ = 1;
  double scale_sum_ = 0;
};
