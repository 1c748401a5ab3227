// What the passes of a few queries over many keys share, forward (decoding) and backward: they are bound by reading
// keys and values, so each is read once, for all the queries and query heads that share it: these H / Hkv * T are the
// rows here, and vectors lie along the head dimension.

#include "attention_blocks.inl"

template <class V, class S, class W>
struct AttentionRows {
  using T = typename V::T;
  using X = Words<V, W>;
  using Blocks = AttentionBlocks<V, S, W>;
  static constexpr int64_t kKeys = 64;    // of one pass: its keys and values stay in L2 for all rows
  static constexpr int64_t kSplit = 512;  // of a range of keys, which one item has
  static constexpr int kSums = Tiles::kColumns == 4 ? 16 : 8;  // registers that hold sums

  static int64_t rows(const Attention& a) { return a.H / a.Hkv * a.T; }
  static int64_t head(const Attention& a, int64_t kv, int64_t r) { return kv * (a.H / a.Hkv) + r / a.T; }
  // Where keys are cut follows from their number alone, so that a result does not depend on the number of threads.
  static int64_t splits(const Attention& a) { return a.S > kSplit ? (a.S + kSplit - 1) / kSplit : 1; }
  // D numbers in whole vectors of words, and where the rest, which is widened, begins.
  static int64_t words(int64_t D) { return D / (X::kPer * V::L) * V::L; }
  static int64_t rest(int64_t D) { return words(D) * X::kPer; }

  // The rows of q, or of o's gradient, as `products` reads them.
  struct Left {
    W* full;  // words(D) of each row
    T* tail;  // and what is left of it, with zeros
    int64_t D;
    static Left take(Arena& arena, int64_t R, int64_t D) {
      W* full = arena.take<W>(R * words(D));
      return {full, arena.take<T>(R * V::L * X::kPer), D};
    }
  };
  static void pack(const Attention& a, const Heads& x, int64_t b, int64_t kv, Left to) {
    const int64_t full = words(to.D), width = V::L * X::kPer;
    for (int64_t r = 0; r < rows(a); ++r) {
      const S* row = Blocks::row(x, b, head(a, kv, r), r % a.T);
      if (full) Blocks::pack_word_rows(row, 0, x.d, 1, rest(to.D), to.full + r * full, full);
      for (int64_t d = 0; d < width; d += V::L) {
        const int64_t at = rest(to.D) + d, n = clamp(to.D - at, 0, V::L);
        (n ? Blocks::load_row(row + at * x.d, x.d, n) : V::set(0)).store(to.tail + r * width + d);
      }
    }
  }

  // The rows of keys [k0, k0 + n); up to a whole vector of keys the last one again, whose score is hidden.
  static void find_rows(const Heads& x, int64_t b, int64_t h, int64_t k0, int64_t n, const S** rows) {
    for (int64_t i = 0, run; i < n; i += run) {
      run = x.pages ? clamp(x.page_size - (k0 + i) % x.page_size, 1, n - i) : n;
      const S* p = Blocks::row(x, b, h, k0 + i);
      for (int64_t j = 0; j < run; ++j) rows[i + j] = p + j * x.t;
    }
    for (int64_t i = n; i % V::L; ++i) rows[i] = rows[n - 1];
  }

  // A row that will be read soon: with several rows in flight the hardware sees no stream. A pass would not fit in L1.
  static void prefetch(const S* row, int64_t D) {
    for (int64_t d = 0; d < D; d += int64_t(64 / sizeof(S))) PREFETCH_L2(row + d);
  }

  static typename X::Vector load_words(const S* p) {
    if constexpr (X::kPer == 1)
      return V::load(p);
    else
      return X::load((const W*)p);
  }

  // s[r][k] = left . right for N rows of the left side from r0: products along d in vectors, whose lanes are summed for
  // as many keys at once as a vector has lanes. `ahead` is asked for meanwhile.
  template <int N>
  static NOINLINE void products(const Left& left, int64_t r0, const S* const* right, int64_t keys,
                                const S* const* ahead, int64_t ahead_D, T* s) {
    constexpr int kTogether = kSums / 4;  // keys that share a load of the left side
    const int64_t full = words(left.D), width = V::L * X::kPer;
    for (int64_t k0 = 0; k0 < keys; k0 += V::L) {
      V lanes[N][V::L];
      for (int64_t k = 0; k < V::L; k += kTogether) {
        const S* const* key = right + k0 + k;
        if (r0 == 0) UNROLLED for (int i = 0; i < kTogether; ++i) prefetch(ahead[k0 + k + i], ahead_D);
        V sum[kTogether][N];
        UNROLLED for (int i = 0; i < kTogether; ++i) UNROLLED for (int n = 0; n < N; ++n) sum[i][n] = V::set(0);
        for (int64_t d = 0; d < full; d += V::L) {
          typename X::Vector x[kTogether];
          UNROLLED for (int i = 0; i < kTogether; ++i) x[i] = load_words(key[i] + d * X::kPer);
          UNROLLED for (int n = 0; n < N; ++n) {
            const typename X::Vector q = X::load(left.full + (r0 + n) * full + d);
            UNROLLED for (int i = 0; i < kTogether; ++i) sum[i][n] = X::dot(x[i], q, sum[i][n]);
          }
        }
        for (int64_t d = rest(left.D); d < left.D; d += V::L) UNROLLED for (int i = 0; i < kTogether; ++i) {
            const V x = load<V>(key[i] + d, clamp(left.D - d, 0, V::L));
            UNROLLED for (int n = 0; n < N; ++n) sum[i][n] =
                fma(x, V::load(left.tail + (r0 + n) * width + d - rest(left.D)), sum[i][n]);
          }
        UNROLLED for (int i = 0; i < kTogether; ++i) UNROLLED for (int n = 0; n < N; ++n) lanes[n][k + i] = sum[i][n];
      }
      for (int n = 0; n < N; ++n) sum_each(lanes[n]).store(s + (r0 + n) * kKeys + k0);
    }
  }

  // n numbers of a row of a mask or bias, from key `k`, in the compute type.
  template <class Number>
  static V load_along(const Scores& x, int64_t at, int64_t n) {
    const Number* p = (const Number*)x.data + at;
    if (x.s == 1) return load<V>(p, n);
    T lanes[V::L] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = T(widen(p[i * x.s]));
    return V::load(lanes);
  }
  static V load_scores(const Scores& x, int64_t b, int64_t h, int64_t t, int64_t k, int64_t n) {
    const int64_t at = b * x.b + h * x.h + t * x.t + k * x.s;
    switch (x.type) {
      case kFloat:
        return load_along<float>(x, at, n);
      case kBFloat16:
        return load_along<bf16>(x, at, n);
      case kHalf:
        return load_along<half>(x, at, n);
      case kDouble:
        return load_along<double>(x, at, n);
      default:
        return load_along<uint8_t>(x, at, n);
    }
  }

  // f(N, r): all rows, in as few groups of 4, 2 and 1 as there are, N an integral constant.
  template <int N>
  struct Count {
    static constexpr int value = N;
  };
  template <class F>
  static void in_groups(int64_t R, F f) {
    int64_t r = 0;
    for (; r + 4 <= R; r += 4) f(Count<4>{}, r);
    for (; r + 2 <= R; r += 2) f(Count<2>{}, r);
    for (; r < R; ++r) f(Count<1>{}, r);
  }

  // The scores of row r at keys k0 + k + [0, V::L) from their products with q: -inf where hidden, and from `keys` on.
  // Where nothing but a positive scale is to be done the products stay as they are: `raw`.
  struct RowScores {
    const Attention& a;
    int64_t b, h, t, k0, keys;
    bool raw;
    V begin, end;
    ScoreOf<V> score;
    RowScores(const Attention& a, int64_t b, int64_t kv, int64_t r, int64_t k0, int64_t keys)
        : a(a), b(b), h(head(a, kv, r)), t(r % a.T), k0(k0), keys(keys), score(a, b, h) {
      const Range seen = visible_keys(a, t, 1);
      begin = V::set(T(clamp(seen.begin - k0, 0, keys))), end = V::set(T(clamp(seen.end - k0, 0, keys)));
      raw = !score.biased && !score.sloped && !score.capped && a.scale > 0;
    }
    V operator()(V dot, int64_t k, T* slope = nullptr) const {
      const int64_t n = clamp(keys - k, 0, V::L);
      const V j = V::iota() + V::set(T(k)), hidden = V::set(-INFINITY);
      V x = dot;
      if (!raw) {
        T bias[V::L];
        if (a.bias.data) load_scores(a.bias, b, h, t, k0 + k, n).store(bias);
        x = score(dot, bias, V::set(T(t + a.q_offset - k0)) - j, slope);
      }
      x = select_lt(j, begin, hidden, select_lt(j, end, x, hidden));
      if (a.mask.data) x = select_lt(V::set(0), load_scores(a.mask, b, h, t, k0 + k, n), x, hidden);
      return x;
    }
  };

  // o[r][d] = o[r][d] * rescale[r] + sum over keys of p[r][k] right[k][d], for N rows from r0 and M vectors from d, the
  // last of which may reach past the end.
  template <int N, int M>
  static NOINLINE void add_rows(const W* p, const S* const* right, int64_t r0, int64_t d, int64_t keys, int64_t D,
                                const T* rescale, const S* const* ahead, int64_t ahead_D, T* o) {
    const int64_t inside = D - d;
    V sum[N][M];
    UNROLLED for (int n = 0; n < N; ++n) UNROLLED for (int i = 0; i < M; ++i) sum[n][i] = V::set(0);
    const bool first = r0 == 0 && d == 0;
    for (int64_t k = 0; k < keys; k += X::kPer) {
      if (first) UNROLLED for (int i = 0; i < X::kPer; ++i) prefetch(ahead[k + i], ahead_D);
      typename X::Vector x[M];
      if constexpr (X::kPer == 2)
        UNROLLED for (int i = 0; i < M; i += 2)
            load_row_pairs(right[k] + d + i * V::L, right[k + 1] + d + i * V::L, inside - i * V::L, x + i);
      else
        UNROLLED for (int i = 0; i < M; ++i) x[i] = i + 1 < M || inside >= M * V::L
                                                        ? V::load(right[k] + d + i * V::L)
                                                        : V::load(right[k] + d + i * V::L, inside - i * V::L);
      UNROLLED for (int n = 0; n < N; ++n) {
        const typename X::Vector left = X::broadcast(p + ((r0 + n) * kKeys + k) / X::kPer);
        UNROLLED for (int i = 0; i < M; ++i) sum[n][i] = X::dot(left, x[i], sum[n][i]);
      }
    }
    UNROLLED for (int n = 0; n < N; ++n) UNROLLED for (int i = 0; i < M; ++i) {
      const int64_t lanes = clamp(inside - i * V::L, 0, V::L);
      T* to = o + (r0 + n) * D + d + i * V::L;
      if (lanes) store(fma(load<V>(to, lanes), V::set(rescale[r0 + n]), sum[n][i]), to, lanes);
    }
  }
  // From d to the end, in blocks of M vectors and then of fewer.
  template <int N, int M = (kSums / N < 8 ? kSums / N : 8)>
  static void add_all_rows(const W* p, const S* const* right, int64_t r0, int64_t d, int64_t keys, int64_t D,
                           const T* rescale, const S* const* ahead, int64_t ahead_D, T* o) {
    for (; d + (M > X::kPer ? M * V::L : 1) <= D; d += M * V::L)
      add_rows<N, M>(p, right, r0, d, keys, D, rescale, ahead, ahead_D, o);
    if constexpr (M > X::kPer) add_all_rows<N, M / 2>(p, right, r0, d, keys, D, rescale, ahead, ahead_D, o);
  }
};
