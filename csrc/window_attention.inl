// window_attention, one window of one head at a time; the formulas are in
// sparsify_kernels/window_attention/reference.py. Included once an instruction set, after window_attention_places.inl.
//
// Only tokens that are there are read: a window's rows are gathered, widened and laid out for the product, its logits
// begin as the bias of its pairs of places, and a tile of queries meets all keys.

constexpr int64_t kTileRows = 24;
constexpr double kSmallestNorm = 1e-12;

// The rows of a window in one head, widened and laid out for the products.
template <class A>
class Rows {
 public:
  static constexpr int64_t lanes = Lanes<A>::width;

  explicit Rows(const WindowInputs& in) : in_(in), width_(rounded_up(in.dim, lanes)) {}

  // Numbers in a row.
  int64_t width() const {
    return width_;
  }

  // Rows of the window's tokens to [count, width].
  template <class T>
  void read(const TokenRows& from, int64_t part, int64_t h, const Places<A>& places, A* to) const {
    const T* rows = static_cast<const T*>(from.data) + part * from.part + h * from.head;
    for (int64_t i = 0; i < places.count(); ++i) {
      read_row<A>(rows + places.token(i) * from.token, in_.dim, to + i * width_);
    }
  }

  // Asks for a row of each part, which the next window reads.
  template <class T>
  SPARSIFY_INLINE void expect(const TokenRows& from, int64_t parts, int64_t h, int64_t token) const {
    const T* row = static_cast<const T*>(from.data) + token * from.token + h * from.head;
    for (int64_t part = 0; part < parts; ++part, row += from.part) {
      expect(row);
    }
  }

  // Asks for a row of a head, to be read or written.
  template <class T>
  SPARSIFY_INLINE void expect(const T* row) const {
    for (int64_t byte = 0; byte < in_.dim * static_cast<int64_t>(sizeof(T)); byte += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(row) + byte, 0, 2);
    }
  }

  // Rows [count, width] to columns [dim, padded]; `from` has room for padded rows.
  void turn(A* from, const Places<A>& places, A* to) const {
    fill(from + places.count() * width_, (places.padded() - places.count()) * width_, A{0});
    for (int64_t j = 0; j < places.padded(); j += lanes) {
      for (int64_t c = 0; c < in_.dim; c += lanes) {
        transpose_square<A>(from + j * width_ + c, width_, to + c * places.padded() + j, places.padded(), in_.dim - c);
      }
    }
  }

  // Divides rows by their lengths, which count as at least the smallest, and leaves the lengths in `norm` [padded].
  void point(A* rows, const Places<A>& places, A* norm, A* inverse) const {
    for (int64_t i = 0; i < places.count(); i += kTogether<A>) {  // beyond the last: what nobody reads
      Vector<A> square[kTogether<A>] = {};
      for (int64_t r = 0; r < smaller(kTogether<A>, places.count() - i); ++r) {
        for (int64_t c = (i + r) * width_; c < (i + r + 1) * width_; c += lanes) {
          square[r] += load(rows + c) * load(rows + c);
        }
      }
      together<A, Add<A>>(square, norm + i);
    }
    for (int64_t i = 0; i < places.padded(); i += lanes) {
      const Vector<A> length = root_of<A>(load(norm + i)), smallest = Vector<A>{} + static_cast<A>(kSmallestNorm);
      store(norm + i, length);
      store(inverse + i, A{1} / larger<A>(smallest, length));
    }
    for (int64_t i = 0; i < places.count(); ++i) {
      for (int64_t c = i * width_; c < (i + 1) * width_; c += lanes) {
        store(rows + c, load(rows + c) * inverse[i]);
      }
    }
  }

  // What the dot products of head h are multiplied by.
  A factor(int64_t h) const {
    if (in_.scale != nullptr) {
      return static_cast<const A*>(in_.scale)[h];
    }
    return in_.cosine ? A{1} : static_cast<A>(1 / __builtin_sqrt(static_cast<double>(in_.dim)));
  }

 private:
  const WindowInputs& in_;
  const int64_t width_;
};

// C = A B, or C += A B where it goes `onto` what is there, as in multiply(). Long sums are made of short
// ones: added up one by one, their terms would be rounded more and more.
template <class A, bool kTransposed>
inline void product(int64_t rows, int64_t vectors, int64_t depth, const A* a, int64_t a_row, const A* b, int64_t b_row,
                    A* c, int64_t c_row, bool onto) {
  constexpr int64_t kShort = sizeof(A) == 8 ? 8 : 32;
  for (int64_t k = 0; k < depth; k += kShort) {
    const Finish<A> finish{nullptr, A{1}, onto || k > 0};
    multiply<A, kTransposed>(rows, vectors, smaller(kShort, depth - k), a + (kTransposed ? k * a_row : k), a_row,
                             b + k * b_row, b_row, c, c_row, finish);
  }
}

template <class A>
class Forward {
 public:
  template <class T>
  static void run(const WindowForward& args, int64_t begin, int64_t end) {
    Forward work(args);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t slab = item / args.in.heads, h = item % args.in.heads, last = args.in.slab_begin(slab + 1);
      work.places_.begin_head(h);
      for (int64_t w = args.in.slab_begin(slab); w < last; ++w) {
        if (work.places_.begin_window(w, w + 1 < last ? w + 1 : w) > 0) {
          work.template window<T>(h);
        }
      }
    }
  }

 private:
  static constexpr int64_t lanes = Lanes<A>::width;

  explicit Forward(const WindowForward& args)
      : args_(args),
        in_(args.in),
        places_(in_),
        rows_(in_),
        most_(rounded_up(in_.most, lanes)),
        scratch_(bytes()),
        queries_(scratch_.take<A>(most_ * rows_.width())),
        keys_(scratch_.take<A>(most_ * rows_.width())),
        panel_(scratch_.take<A>(most_ * rows_.width())),
        values_(scratch_.take<A>(most_ * rows_.width())),
        logits_(scratch_.take<A>(kTileRows * most_)),
        output_(scratch_.take<A>(kTileRows * rows_.width())),
        norm_(scratch_.take<A>(most_)),
        inverse_(scratch_.take<A>(most_)),
        top_(scratch_.take<A>(rounded_up(kTileRows, lanes))),
        total_(scratch_.take<A>(rounded_up(kTileRows, lanes))) {}

  // What the constructor takes, with room for rounding each piece up.
  int64_t bytes() const {
    const int64_t rows = 4 * most_ + kTileRows;
    const int64_t numbers = rows * rows_.width() + kTileRows * most_ + 2 * most_ + 2 * rounded_up(kTileRows, lanes);
    return numbers * static_cast<int64_t>(sizeof(A)) + 11 * 64;
  }

  template <class T>
  void window(int64_t h) {
    const int64_t count = places_.count(), width = rows_.width(), padded = places_.padded();
    const A factor = rows_.factor(h);
    rows_.template read<T>(in_.qkv, 0, h, places_, queries_);
    rows_.template read<T>(in_.qkv, 1, h, places_, keys_);
    rows_.template read<T>(in_.qkv, 2, h, places_, values_);
    if (in_.cosine) {
      rows_.point(queries_, places_, norm_, inverse_);
      rows_.point(keys_, places_, norm_, inverse_);
    }
    rows_.turn(keys_, places_, panel_);
    const int64_t tiles = (count + kTileRows - 1) / kTileRows;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = count * t / tiles, rows = count * (t + 1) / tiles - begin;
      for (int64_t i = 0; i < rows; ++i) {
        places_.next(begin + i, [&](int64_t token) { rows_.template expect<T>(in_.qkv, 3, h, token); });
        rows_.expect(static_cast<const T*>(args_.output) + (places_.token(begin + i) * in_.heads + h) * in_.dim);
      }
      product<A, false>(rows, padded / lanes, in_.dim, queries_ + begin * width, width, panel_, padded, logits_, padded,
                        false);
      probabilities(begin, rows, factor);
      product<A, false>(rows, width / lanes, count, logits_, padded, values_, width, output_, width, false);
      write<T>(begin, rows, h);
    }
  }

  // exp(logit - top) in place of the dot products; the largest logit and the sum of each row.
  void probabilities(int64_t begin, int64_t rows, A factor) {
    const int64_t padded = places_.padded();
    for (int64_t i = 0; i < rows; i += kTogether<A>) {
      const int64_t some = smaller(kTogether<A>, rows - i);
      Vector<A> best[kTogether<A>] = {}, total[kTogether<A>] = {};
      for (int64_t r = 0; r < some; ++r) {
        best[r] = places_.logits(begin + i + r, factor, logits_ + (i + r) * padded);
      }
      together<A, Most<A>>(best, top_ + i);
      for (int64_t r = 0; r < some; ++r) {
        A* row = logits_ + (i + r) * padded;
        const A top = top_[i + r];
        for (int64_t j = 0; j < padded; j += lanes) {
          const Vector<A> e = exp_of<A>(load(row + j) - top);
          store(row + j, e);
          total[r] += e;
        }
      }
      together<A, Add<A>>(total, total_ + i);
    }
  }

  template <class T>
  void write(int64_t begin, int64_t rows, int64_t h) {
    fill(total_ + rows, rounded_up(rows, lanes) - rows, A{1});
    fill(top_ + rows, rounded_up(rows, lanes) - rows, A{0});
    for (int64_t i = 0; i < rows; i += lanes) {
      const Vector<A> total = load(total_ + i);
      store(top_ + i, load(top_ + i) + log_of(total));
      store(total_ + i, A{1} / total);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = places_.token(begin + i) * in_.heads + h;
      static_cast<A*>(args_.lse)[at] = top_[i];
      write_row(output_ + i * rows_.width(), in_.dim, total_[i], static_cast<T*>(args_.output) + at * in_.dim);
    }
  }

  const WindowForward& args_;
  const WindowInputs& in_;
  Places<A> places_;
  const Rows<A> rows_;
  const int64_t most_;
  Scratch scratch_;
  A *queries_, *keys_, *panel_, *values_, *logits_, *output_, *norm_, *inverse_, *top_, *total_;
};
