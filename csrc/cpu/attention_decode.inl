// Attention of a few queries on many keys: decoding. It is bound by reading keys and values, so each is read once, for
// all the queries and query heads that share it: these H / Hkv * T are the rows here, and vectors lie along the head
// dimension. Keys are cut into ranges whose results are merged by log-sum-exp; where they are cut follows from the
// number of keys alone, so that a result does not depend on the number of threads.

#include "attention_blocks.inl"

template <class V, class S, class W>
struct AttentionDecode {
  using T = typename V::T;
  using X = Words<V, W>;
  using Blocks = AttentionBlocks<V, S, W>;
  static constexpr int64_t kKeys = 64;    // of one pass: its keys and values stay in L2 for all rows
  static constexpr int64_t kSplit = 512;  // of one range: what a range leaves behind is below 2% of what it reads
  static constexpr int kSums = Tiles::kColumns == 4 ? 16 : 8;  // registers that hold sums

  static int64_t rows(const Attention& a) { return a.H / a.Hkv * a.T; }
  static int64_t splits(const Attention& a) { return a.S > kSplit ? (a.S + kSplit - 1) / kSplit : 1; }
  static int64_t result_size(const Attention& a) { return rows(a) * (a.Dv + 2); }  // o, maximum and sum of every row
  // The head dimension in whole vectors of words, and where the rest, which is widened, begins.
  static int64_t words(int64_t D) { return D / (X::kPer * V::L) * V::L; }
  static int64_t rest(int64_t D) { return words(D) * X::kPer; }

  struct Workspace {
    W *q, *p;  // p is s where a word is one number
    T *q_rest, *s, *rescale, *result;
    const S *keys[kKeys], *values[kKeys], *next[kKeys];  // next: keys of the next pass
    Workspace(const Attention& a, void* memory, int64_t* bytes) {
      Arena arena{(char*)memory, 0};
      const int64_t R = rows(a);
      q = arena.take<W>(R * words(a.D));
      q_rest = arena.take<T>(R * V::L * X::kPer);
      s = arena.take<T>(R * kKeys);
      p = X::kPer == 1 ? (W*)s : arena.take<W>(R * kKeys / X::kPer);
      rescale = arena.take<T>(R);
      result = arena.take<T>(a.splits == 1 ? result_size(a) : 0);
      if (bytes) *bytes = arena.used;
    }
  };
  static int64_t bytes(const Attention& a) {
    int64_t n;
    Workspace(a, nullptr, &n);
    return n;
  }

  static void pack_queries(const Attention& a, const Workspace& w, int64_t b, int64_t kv) {
    const int64_t G = a.H / a.Hkv, full = words(a.D), width = V::L * X::kPer;
    for (int64_t r = 0; r < G * a.T; ++r) {
      const S* q = Blocks::row(a.q, b, kv * G + r / a.T, r % a.T);
      if (full) Blocks::pack_word_rows(q, 0, a.q.d, 1, rest(a.D), w.q + r * full, full);
      for (int64_t d = 0; d < width; d += V::L) {
        const int64_t at = rest(a.D) + d, n = clamp(a.D - at, 0, V::L);
        (n ? Blocks::load_row(q + at * a.q.d, a.q.d, n) : V::set(0)).store(w.q_rest + r * width + d);
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

  // s[r][k] = q.k for N rows from r0: products along d in vectors, whose lanes are summed for as many keys at once as a
  // vector has lanes.
  template <int N>
  static NOINLINE void products(const Attention& a, const Workspace& w, int64_t r0, int64_t keys) {
    constexpr int kTogether = kSums / 4;  // keys that share a load of q
    const int64_t full = words(a.D), width = V::L * X::kPer;
    for (int64_t k0 = 0; k0 < keys; k0 += V::L) {
      V lanes[N][V::L];
      for (int64_t k = 0; k < V::L; k += kTogether) {
        const S* const* key = w.keys + k0 + k;
        if (r0 == 0) UNROLLED for (int i = 0; i < kTogether; ++i) prefetch(w.values[k0 + k + i], a.Dv);
        V sum[kTogether][N];
        UNROLLED for (int i = 0; i < kTogether; ++i) UNROLLED for (int n = 0; n < N; ++n) sum[i][n] = V::set(0);
        for (int64_t d = 0; d < full; d += V::L) {
          typename X::Vector x[kTogether];
          UNROLLED for (int i = 0; i < kTogether; ++i) x[i] = load_words(key[i] + d * X::kPer);
          UNROLLED for (int n = 0; n < N; ++n) {
            const typename X::Vector q = X::load(w.q + (r0 + n) * full + d);
            UNROLLED for (int i = 0; i < kTogether; ++i) sum[i][n] = X::dot(x[i], q, sum[i][n]);
          }
        }
        for (int64_t d = rest(a.D); d < a.D; d += V::L) UNROLLED for (int i = 0; i < kTogether; ++i) {
            const V x = load<V>(key[i] + d, clamp(a.D - d, 0, V::L));
            UNROLLED for (int n = 0; n < N; ++n) sum[i][n] =
                fma(x, V::load(w.q_rest + (r0 + n) * width + d - rest(a.D)), sum[i][n]);
          }
        UNROLLED for (int i = 0; i < kTogether; ++i) UNROLLED for (int n = 0; n < N; ++n) lanes[n][k + i] = sum[i][n];
      }
      for (int n = 0; n < N; ++n) sum_each(lanes[n]).store(w.s + (r0 + n) * kKeys + k0);
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

  // p = exp(score - max) in place of the products of row r, the running maximum and sum, and what the old o is
  // multiplied with.
  static NOINLINE void exponentials(const Attention& a, const Workspace& w, int64_t b, int64_t h, int64_t r, int64_t k0,
                                    int64_t keys, T* m, T* l) {
    const int64_t t = r % a.T;
    const Range seen = visible_keys(a, t, 1);
    const V begin = V::set(T(clamp(seen.begin - k0, 0, keys))), end = V::set(T(clamp(seen.end - k0, 0, keys)));
    const V hidden = V::set(-INFINITY);
    const ScoreOf<V> score(a, b, h);
    T* s = w.s + r * kKeys;
    V top = V::set(*m), total = V::set(0);
    for (int64_t k = 0; k < keys; k += V::L) {
      const int64_t n = clamp(keys - k, 0, V::L);
      const V j = V::iota() + V::set(T(k));
      T bias[V::L];
      if (a.bias.data) load_scores(a.bias, b, h, t, k0 + k, n).store(bias);
      V x = score(V::load(s + k), bias, V::set(T(t + a.q_offset - k0)) - j);
      x = select_lt(j, begin, hidden, select_lt(j, end, x, hidden));
      if (a.mask.data) x = select_lt(V::set(0), load_scores(a.mask, b, h, t, k0 + k, n), x, hidden);
      x.store(s + k);
      top = max(top, x);
    }
    const T now = max_of(top);
    T rescale[V::L];
    exp(V::set(*m - now)).store(rescale);
    for (int64_t k = 0; k < keys; k += V::L) {
      const V p = exp_fma(V::load(s + k), V::set(1), V::set(-now), V::set(0));
      if constexpr (X::kPer == 1)
        p.store((T*)w.p + r * kKeys + k);
      else
        p.store((S*)w.p + r * kKeys + k);
      total = total + p;
    }
    *l = *l * rescale[0] + sum(total);
    *m = now;
    w.rescale[r] = rescale[0];
  }

  // o[r][d] = o[r][d] * rescale[r] + sum over keys of p[r][k] v[k][d], for N rows from r0 and M vectors from d, the
  // last of which may reach past the end.
  template <int N, int M>
  static NOINLINE void add_values(const Attention& a, const Workspace& w, int64_t r0, int64_t d, int64_t keys, T* o) {
    const int64_t inside = a.Dv - d;
    V sum[N][M];
    UNROLLED for (int n = 0; n < N; ++n) UNROLLED for (int i = 0; i < M; ++i) sum[n][i] = V::set(0);
    const bool first = r0 == 0 && d == 0;
    for (int64_t k = 0; k < keys; k += X::kPer) {
      if (first) UNROLLED for (int i = 0; i < X::kPer; ++i) prefetch(w.next[k + i], a.D);
      typename X::Vector x[M];
      if constexpr (X::kPer == 2)
        UNROLLED for (int i = 0; i < M; i += 2)
            load_row_pairs(w.values[k] + d + i * V::L, w.values[k + 1] + d + i * V::L, inside - i * V::L, x + i);
      else
        UNROLLED for (int i = 0; i < M; ++i) x[i] = i + 1 < M || inside >= M * V::L
                                                        ? V::load(w.values[k] + d + i * V::L)
                                                        : V::load(w.values[k] + d + i * V::L, inside - i * V::L);
      UNROLLED for (int n = 0; n < N; ++n) {
        const typename X::Vector p = X::broadcast(w.p + ((r0 + n) * kKeys + k) / X::kPer);
        UNROLLED for (int i = 0; i < M; ++i) sum[n][i] = X::dot(p, x[i], sum[n][i]);
      }
    }
    UNROLLED for (int n = 0; n < N; ++n) UNROLLED for (int i = 0; i < M; ++i) {
      const int64_t lanes = clamp(inside - i * V::L, 0, V::L);
      T* to = o + (r0 + n) * a.Dv + d + i * V::L;
      if (lanes) store(fma(load<V>(to, lanes), V::set(w.rescale[r0 + n]), sum[n][i]), to, lanes);
    }
  }
  // From d to the end, in blocks of M vectors and then of fewer.
  template <int N, int M>
  static void add_all_values(const Attention& a, const Workspace& w, int64_t r0, int64_t d, int64_t keys, T* o) {
    for (; d + (M > X::kPer ? M * V::L : 1) <= a.Dv; d += M * V::L) add_values<N, M>(a, w, r0, d, keys, o);
    if constexpr (M > X::kPer) add_all_values<N, M / 2>(a, w, r0, d, keys, o);
  }

  template <int N>
  static void pass(const Attention& a, const Workspace& w, int64_t b, int64_t kv, int64_t r0, int64_t k0, int64_t keys,
                   T* result) {
    const int64_t R = rows(a);
    T *o = result, *m = result + R * a.Dv, *l = m + R;
    products<N>(a, w, r0, keys);
    for (int64_t r = r0; r < r0 + N; ++r)
      exponentials(a, w, b, kv * (a.H / a.Hkv) + r / a.T, r, k0, keys, m + r, l + r);
    add_all_values<N, (kSums / N < 8 ? kSums / N : 8)>(a, w, r0, 0, keys, o);
  }

  static void run(const Attention& a, int64_t item, void* memory) {
    const int64_t split = item % a.splits, head = item / a.splits, b = head / a.Hkv, kv = head % a.Hkv, R = rows(a);
    Workspace w(a, memory, nullptr);
    T* result = a.splits == 1 ? w.result : (T*)a.partial + item * result_size(a);
    for (int64_t i = 0; i < R * a.Dv; ++i) result[i] = 0;
    for (int64_t r = 0; r < R; ++r) result[R * a.Dv + r] = T(-1e30), result[R * (a.Dv + 1) + r] = 0;
    const Range seen = visible_keys(a, 0, a.T);
    const int64_t begin = clamp(split * kSplit, seen.begin, seen.end);
    const int64_t end = split + 1 == a.splits ? seen.end : clamp((split + 1) * kSplit, seen.begin, seen.end);
    if (begin < end) pack_queries(a, w, b, kv);
    if (begin < end) find_rows(a.k, b, kv, begin, clamp(end - begin, 0, kKeys), w.next);
    for (int64_t k0 = begin; k0 < end; k0 += kKeys) {
      const int64_t keys = clamp(end - k0, 0, kKeys), left = clamp(end - k0 - keys, 0, kKeys);
      memcpy(w.keys, w.next, sizeof(w.keys));
      find_rows(a.v, b, kv, k0, keys, w.values);
      if (left) find_rows(a.k, b, kv, k0 + keys, left, w.next);
      int64_t r = 0;
      for (; r + 4 <= R; r += 4) pass<4>(a, w, b, kv, r, k0, keys, result);
      for (; r + 2 <= R; r += 2) pass<2>(a, w, b, kv, r, k0, keys, result);
      for (; r < R; ++r) pass<1>(a, w, b, kv, r, k0, keys, result);
    }
    if (a.splits == 1) write(a, b, kv, result);
  }

  // o and lse of key head kv from the results of its ranges; the sink is one more score, without a value. The maxima
  // in `results` become the ranges' weights.
  static void write(const Attention& a, int64_t b, int64_t kv, T* results) {
    const int64_t R = rows(a), size = result_size(a);
    for (int64_t r = 0; r < R; ++r) {
      const int64_t h = kv * (a.H / a.Hkv) + r / a.T, t = r % a.T;
      T *o = results + r * a.Dv, *m = results + R * a.Dv + r, *l = m + R;
      double top = a.sink ? ((const T*)a.sink)[h] : -1e30, total = 0;
      for (int64_t i = 0; i < a.splits; ++i) top = m[i * size] > top ? m[i * size] : top;
      if (a.sink) total = ::exp(((const T*)a.sink)[h] - top);
      for (int64_t i = 0; i < a.splits; ++i) total += ::exp(m[i * size] - top) * l[i * size];
      if (a.lse) a.lse[b * a.lse_b + h * a.lse_h + t] = total == 0 ? -INFINITY : top + log(total);
      for (int64_t i = 0; i < a.splits; ++i) m[i * size] = total == 0 ? T(0) : T(::exp(m[i * size] - top) / total);
      S* to = (S*)Blocks::row(a.o, b, h, t);
      for_vectors<V>(a.Dv, [&](int64_t d, int64_t n) {
        V x = load<V>(o + d, n) * V::set(m[0]);
        for (int64_t i = 1; i < a.splits; ++i) x = fma(load<V>(o + i * size + d, n), V::set(m[i * size]), x);
        if (a.o.d == 1) {
          store(x, to + d, n);
        } else {
          T lanes[V::L];
          x.store(lanes);
          for (int64_t i = 0; i < n; ++i) narrow(lanes[i], to[(d + i) * a.o.d]);
        }
      });
    }
  }
};

template <class V, class S, class W>
int64_t attention_decode_splits(const Attention& a) {
  return AttentionDecode<V, S, W>::splits(a);
}
template <class V, class S, class W>
int64_t attention_decode_bytes(const Attention& a) {
  return AttentionDecode<V, S, W>::bytes(a);
}
template <class V, class S, class W>
void attention_decode(const Attention& a, int64_t item, void* workspace) {
  AttentionDecode<V, S, W>::run(a, item, workspace);
}
template <class V, class S, class W>
void attention_decode_merge(const Attention& a, int64_t begin, int64_t end) {
  using Decode = AttentionDecode<V, S, W>;
  for (int64_t head = begin; head < end; ++head)
    Decode::write(a, head / a.Hkv, head % a.Hkv, (typename V::T*)a.partial + head * a.splits * Decode::result_size(a));
}

// Rows (h, t) of new keys, values or queries to where they are kept, the first r.rotated values of each rotated by the
// angles of its position: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).
template <class V, class S, class Angle>
void rotate_rows(const Rotation& r, int64_t begin, int64_t end) {
  using T = typename V::T;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t h = row / r.T, t = row % r.T, at = r.first + t, pairs = r.rotated / 2;
    const S* x = (const S*)r.from.data + h * r.from.h + t * r.from.t;
    S* y = (S*)r.to.data + h * r.to.h + (r.to.pages ? at % r.to.page_size : at) * r.to.t;
    if (r.to.pages) y += r.to.pages[at / r.to.page_size] * r.to.b;
    const Angle* cosine = (const Angle*)r.cos + (r.position + t) * r.cos_row;
    const Angle* sine = (const Angle*)r.sin + (r.position + t) * r.sin_row;
    const int64_t step = r.interleaved ? 2 : 1, apart = r.interleaved ? 1 : pairs;
    for (int64_t i = 0; i < pairs; ++i) {
      const T c = T(widen(cosine[i * r.cos_d])), s = T(widen(sine[i * r.sin_d]));
      const T x1 = widen(x[i * step * r.from.d]), x2 = widen(x[(i * step + apart) * r.from.d]);
      narrow(x1 * c - x2 * s, y[i * step * r.to.d]);
      narrow(x2 * c + x1 * s, y[(i * step + apart) * r.to.d]);
    }
    for (int64_t d = r.rotated; d < r.D; ++d) y[d * r.to.d] = x[d * r.from.d];
  }
}
template <class V, class S>
void attention_decode_rotate(const Rotation& r, int64_t begin, int64_t end) {
  switch (r.type) {
    case kBFloat16:
      return rotate_rows<V, S, bf16>(r, begin, end);
    case kHalf:
      return rotate_rows<V, S, half>(r, begin, end);
    case kDouble:
      return rotate_rows<V, S, double>(r, begin, end);
    default:
      return rotate_rows<V, S, float>(r, begin, end);
  }
}

constexpr AttentionDecodeKernels kTable = {
    PER_TYPE_AND_WORD(attention_decode_splits), PER_TYPE_AND_WORD(attention_decode_bytes),
    PER_TYPE_AND_WORD(attention_decode), PER_TYPE_AND_WORD(attention_decode_merge), PER_TYPE(attention_decode_rotate)};
