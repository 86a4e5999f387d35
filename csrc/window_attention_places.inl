// Where the tokens of a window stand, and the bias of every pair of them in one head. Included once an instruction set,
// after window_attention_rows.inl.

constexpr float kPenalty = -100.0f;  // between regions

// Places of a window whose bias is expanded to a row for each query place, which then fits in registers and is permuted
// there: float with AVX-512.
constexpr int64_t kDensePlaces = 64;

template <class A>
constexpr bool kPermutes = kBytes == 64 && kSame<A, float>;

// The bias of one head between all places, and the window at hand: which tokens it has and where they stand.
template <class A>
class Places {
 public:
  static constexpr int64_t lanes = Lanes<A>::width;

  explicit Places(const WindowInputs& in)
      : in_(in),
        dense_(kPermutes<A> && in.height * in.width <= kDensePlaces),
        most_(rounded_up(in.most, lanes)),
        scratch_(bytes()),
        table_(scratch_.take<A>(dense_ ? kDensePlaces * kDensePlaces : 0)),
        pairs_(scratch_.take<A>(dense_ ? kDensePlaces * kDensePlaces : 0)),
        sums_(scratch_.take<double>(in.table())),
        at_(scratch_.take<Integer>(most_)),
        part_(scratch_.take<Integer>(most_)),
        slot_(scratch_.take<Integer>(kDensePlaces)),
        seen_(scratch_.take<int64_t>(most_)) {}

  // Called before the first window of a head.
  void begin_head(int64_t h) {
    bias_ = static_cast<const A*>(in_.bias) + h * in_.table() + origin();
    for (int64_t i = 0; i < in_.height * in_.width && dense_; ++i) {
      for (int64_t row = 0; row < in_.height; ++row) {
        const A* from = bias_ + offset(i) - row * in_.columns();
        A* to = table_ + i * kDensePlaces + row * in_.width;
        for (int64_t column = 0; column < in_.width; ++column) {
          to[column] = from[-column];
        }
      }
    }
  }

  // Returns how many tokens window w has; the one after it is `next`.
  int64_t begin_window(int64_t w, int64_t next) {
    next_ = next == w ? nullptr : in_.member + in_.start[next];
    next_count_ = in_.start[next + 1] - in_.start[next];
    first_ = in_.start[w];
    count_ = in_.start[w + 1] - first_;
    padded_ = rounded_up(count_, lanes);
    all_ = dense_ && count_ == padded_ && count_ == in_.height * in_.width;
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t place = in_.place[first_ + i];
      at_[i] = static_cast<Integer>(dense_ ? place : offset(place));
      all_ = all_ && place == i;
    }
    for (int64_t i = count_; i < padded_; ++i) {
      at_[i] = 0;
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      beyond_[lane] = padded_ - lanes + lane < count_ ? A{0} : -static_cast<A>(__builtin_inf());
    }
    name_parts();
    return count_;
  }

  int64_t count() const {
    return count_;
  }
  // The number of tokens filled up to whole vectors.
  int64_t padded() const {
    return padded_;
  }
  int64_t token(int64_t i) const {
    return in_.member[first_ + i];
  }

  // Calls ask(token) for the tokens of the next window that are to be asked for while token i is worked on.
  template <class Ask>
  SPARSIFY_INLINE void next(int64_t i, const Ask& ask) const {
    for (int64_t j = next_count_ * i / count_; next_ != nullptr && j < next_count_ * (i + 1) / count_; ++j) {
      ask(next_[j]);
    }
  }

  // Makes logits of the dot products of token i: times the factor, plus bias and penalty, -inf beyond the last token.
  // Returns the largest of each lane.
  SPARSIFY_INLINE Vector<A> logits(int64_t i, A factor, A* row) const {
    if (parts_ > 1) {
      const Integers own = Integers{} + part_[i];
      const Vector<A> penalty = Vector<A>{} + A{kPenalty};
      return with_bias(i, row, [&](int64_t j, Vector<A> bias) {
        return load(row + j) * factor + (bias + (integers(part_ + j) != own ? penalty : Vector<A>{}));
      });
    }
    return with_bias(i, row, [&](int64_t j, Vector<A> bias) { return load(row + j) * factor + bias; });
  }

  // Called before the first window of a head whose pairs are to be added up.
  void begin_pairs() {
    fill(pairs_, dense_ ? kDensePlaces * kDensePlaces : 0, A{0});
    fill(sums_, in_.table(), 0.0);
  }

  // Called before the first pairs of a window.
  void begin_pairs_of_window() {
    if (dense_) {
      for (int64_t i = 0; i < kDensePlaces; ++i) {
        slot_[i] = -1;
      }
      for (int64_t i = 0; i < count_; ++i) {
        slot_[at_[i]] = static_cast<Integer>(i);
      }
    }
  }

  // Adds a number for each pair of token i and another token.
  void add_pairs(int64_t i, const A* from) {
    if constexpr (kPermutes<A>) {
      if (dense_) {
        return spread(from, pairs_ + at_[i] * kDensePlaces);
      }
    }
    double* row = sums_ + origin() + at_[i];
    for (int64_t j = 0; j < count_; ++j) {
      row[-static_cast<int64_t>(at_[j])] += static_cast<double>(from[j]);
    }
  }

  // What was added up for each difference of places.
  void end_pairs(A* to) {
    for (int64_t i = 0; i < in_.height * in_.width && dense_; ++i) {
      for (int64_t row = 0; row < in_.height; ++row) {
        const A* from = pairs_ + i * kDensePlaces + row * in_.width;
        double* sum = sums_ + origin() + offset(i) - row * in_.columns();
        for (int64_t column = 0; column < in_.width; ++column) {
          sum[-column] += static_cast<double>(from[column]);
        }
      }
    }
    for (int64_t i = 0; i < in_.table(); ++i) {
      to[i] = static_cast<A>(sums_[i]);
    }
  }

 private:
  using Integer = typename Lanes<A>::integer;
  using Integers = typename Lanes<A>::integers;

  // What the constructor takes, with room for rounding each piece up.
  int64_t bytes() const {
    const int64_t tables = dense_ ? 2 * kDensePlaces * kDensePlaces : 0;
    return (tables + 2 * most_ + kDensePlaces) * static_cast<int64_t>(sizeof(A)) + (in_.table() + most_) * 8 + 9 * 64;
  }

  // Where a place stands in the table, from that of place 0; differences of offsets are those of places.
  int64_t offset(int64_t place) const {
    return place / in_.width * in_.columns() + place % in_.width;
  }
  int64_t origin() const {
    return (in_.height - 1) * in_.columns() + in_.width - 1;
  }

  static SPARSIFY_INLINE Integers integers(const Integer* from) {
    Integers v;
    __builtin_memcpy(&v, from, sizeof(v));
    return v;
  }

  // Gives the regions of the window small numbers.
  void name_parts() {
    parts_ = 0;
    for (int64_t i = 0; i < count_ && in_.region != nullptr; ++i) {
      const int64_t region = in_.region[first_ + i];
      int64_t name = 0;
      while (name < parts_ && seen_[name] != region) {
        ++name;
      }
      seen_[name] = region;
      parts_ += name == parts_;
      part_[i] = static_cast<Integer>(name);
    }
    for (int64_t i = count_; i < padded_ && parts_ > 1; ++i) {
      part_[i] = 0;
    }
  }

  // row[j] = logit(j, bias of tokens i and j) for every vector of tokens; returns the largest of each lane.
  template <class Logit>
  SPARSIFY_INLINE Vector<A> with_bias(int64_t i, A* row, const Logit& logit) const {
    Vector<A> best = Vector<A>{} - static_cast<A>(__builtin_inf());
    const auto keep = [&](int64_t j, Vector<A> bias) {
      Vector<A> value = logit(j, bias);
      value = j + lanes > count_ ? value + load(beyond_) : value;
      best = larger<A>(value, best);
      store(row + j, value);
    };
    const A* own = table_ + (dense_ ? at_[i] * kDensePlaces : 0);
    if (all_) {
      for (int64_t j = 0; j < padded_; j += lanes) {
        keep(j, load(own + j));
      }
      return best;
    }
#if SPARSIFY_VECTOR_BYTES == 64
    if constexpr (kPermutes<A>) {
      if (dense_) {
        const __m512 a = load(own), b = load(own + 16), c = load(own + 32), d = load(own + 48);
        for (int64_t j = 0; j < padded_; j += lanes) {
          const __m512i at = _mm512_load_si512(at_ + j);
          const __m512 low = _mm512_permutex2var_ps(a, at, b), high = _mm512_permutex2var_ps(c, at, d);
          keep(j, _mm512_mask_blend_ps(_mm512_test_epi32_mask(at, _mm512_set1_epi32(32)), low, high));
        }
        return best;
      }
      for (int64_t j = 0; j < padded_; j += lanes) {
        const __m512i away = _mm512_sub_epi32(_mm512_set1_epi32(at_[i]), _mm512_load_si512(at_ + j));
        keep(j, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, away, bias_, 4));
      }
      return best;
    }
#endif
    const A* from = bias_ + at_[i];
    for (int64_t j = 0; j < padded_; j += lanes) {
      A bias[lanes];
      for (int64_t lane = 0; lane < lanes; ++lane) {
        bias[lane] = from[-static_cast<int64_t>(at_[j + lane])];
      }
      keep(j, load(bias));
    }
    return best;
  }

  // Adds `from` at the places of its tokens.
  void spread(const A* from, A* to) const {
#if SPARSIFY_VECTOR_BYTES == 64
    const __m512 zero = _mm512_setzero_ps();
    const __m512 a = load(from), b = padded_ > 16 ? load(from + 16) : zero;
    const __m512 c = padded_ > 32 ? load(from + 32) : zero, d = padded_ > 48 ? load(from + 48) : zero;
    for (int64_t j = 0; j < kDensePlaces; j += lanes) {
      const __m512i slot = _mm512_load_si512(slot_ + j);
      const __m512 low = _mm512_permutex2var_ps(a, slot, b), high = _mm512_permutex2var_ps(c, slot, d);
      const __m512 value = _mm512_mask_blend_ps(_mm512_test_epi32_mask(slot, _mm512_set1_epi32(32)), low, high);
      store<A>(to + j,
               load(to + j) + _mm512_maskz_mov_ps(_mm512_cmpge_epi32_mask(slot, _mm512_setzero_si512()), value));
    }
#endif
  }

  const WindowInputs& in_;
  const bool dense_;
  const int64_t most_;
  Scratch scratch_;
  A *table_, *pairs_;
  double* sums_;
  Integer *at_, *part_, *slot_;  // of each token its place and region; of each place its token, or -1
  int64_t* seen_;
  const A* bias_ = nullptr;        // of difference 0
  const int64_t* next_ = nullptr;  // the tokens of the next window
  int64_t first_ = 0, count_ = 0, padded_ = 0, parts_ = 0, next_count_ = 0;
  bool all_ = false;  // token i at place i, none missing
  A beyond_[lanes];   // 0 for the tokens of the last vector, -inf beyond them
};
