// Attention forward: one item is some blocks of queries of one head, one pass over the keys with a running maximum.
// What a query gets does not depend on the blocks beside its own.

#include "attention_blocks.inl"

template <class V, class S, class W>
struct AttentionFwd : AttentionBlocks<V, S, W> {
  using Blocks = AttentionBlocks<V, S, W>;
  using Blocks::kJoined, Blocks::kPanel, Blocks::kPer, Blocks::kQueries, Blocks::kRow, Blocks::kVectors;
  using typename Blocks::T;
  static constexpr int64_t kPiece = 32;
  static constexpr int64_t kKeys = 96;  // s is then 24 KiB for 64 queries: with a row of keys it fits in L1

  static int64_t blocks(const Attention& a) { return (a.T + kQueries - 1) / kQueries; }
  // Of an item. A window's keys are cut where its first query begins to see, which is each block's own place.
  static int64_t together(const Attention& a) { return a.left < 0 && a.together > 1 ? a.together : 1; }
  static int64_t groups(const Attention& a) { return (blocks(a) + together(a) - 1) / together(a); }
  static int64_t items(const Attention& a) { return a.B * a.H * groups(a); }

  struct Workspace {
    W *q, *keys, *values, *scratch;
    T *s, *o, *m, *l, *l_low, *mask, *bias, *keep;
    Workspace(const Attention& a, void* memory, int64_t* bytes) {
      Arena arena{(char*)memory, 0};
      const int64_t Dw = Blocks::words(a.D), n = together(a);
      q = arena.take<W>(n * Dw * kRow);
      s = arena.take<T>(kKeys * kRow);
      o = arena.take<T>(n * a.Dv * kRow);
      keys = arena.take<W>(kKeys * Dw);
      values = arena.take<W>(kKeys / kPer * Blocks::spread(a.Dv));
      scratch = arena.take<W>(kPer == 2 ? Dw * kQueries : 0);
      m = arena.take<T>(n * kQueries);
      l = arena.take<T>(n * kQueries);
      l_low = arena.take<T>(n * kQueries);
      mask = arena.take<T>(a.mask.data ? kKeys * kRow : 0);
      bias = arena.take<T>(a.bias.data ? kKeys * kRow : 0);
      keep = arena.take<T>(a.dropout_p > 0 ? kKeys * kRow : 0);
      if (bytes) *bytes = arena.used;
    }
    Workspace of(const Attention& a, int64_t i) const {  // the i-th of the blocks; tiles are of one after the other
      Workspace w = *this;
      w.q += i * Blocks::words(a.D) * kRow, w.o += i * a.Dv * kRow;
      w.m += i * kQueries, w.l += i * kQueries, w.l_low += i * kQueries;
      return w;
    }
  };
  static int64_t bytes(const Attention& a) {
    int64_t n;
    Workspace(a, nullptr, &n);
    return n;
  }

  // p = exp(s * scale - max) in place, as words along keys; the running maximum m and sum l of every query follow, and
  // rescale[v] is what the old sums have to be multiplied with. Dropout (`keep` is not null) does not touch the sum.
  // Sums are short: of kPiece keys, of these in a block, and of blocks, where what is rounded off is kept in l_low.
  // Added one by one to a sum of thousands, probabilities would leave lse, and with it every gradient, several times as
  // far from the truth.
  static void exponentials(T* s, const int64_t* ends, int64_t vectors, T scale, const T* keep, T* m, T* l, T* l_low,
                           V* rescale) {
    for (int64_t v = 0; v < vectors; ++v) {
      T* column = s + v * V::L;
      const int64_t keys = ends[v];
      const V c = V::set(scale), old = V::load(m + v * V::L);
      auto score = [&](int64_t k) { return V::load(column + k * kRow); };
      V top[2] = {V::set(-INFINITY), V::set(-INFINITY)};
      int64_t k = 0;
      for (; k + 2 <= keys; k += 2) {
        top[0] = max(top[0], score(k));
        top[1] = max(top[1], score(k + 1));
      }
      if (k < keys) top[0] = max(top[0], score(k));
      const V now = max(old, max(top[0], top[1]) * c);  // the scale is positive
      now.store(m + v * V::L);
      rescale[v] = exp(old - now);

      const V shift = V::set(0) - now;
      auto probability = [&](int64_t k) { return exp_fma(score(k), c, shift, V::set(0)); };
      V block = V::set(0);
      auto drop = [&](V p, int64_t k) { return keep ? p * V::load(keep + k * kRow + v * V::L) : p; };
      for (k = 0; k < keys;) {
        const int64_t end = clamp(k + kPiece, 0, keys);
        V sum[2] = {V::set(0), V::set(0)};
        for (; k + 2 <= end; k += 2) {
          const V p = probability(k), next = probability(k + 1);
          sum[0] = sum[0] + p;
          sum[1] = sum[1] + next;
          if constexpr (kPer == 1) {
            drop(p, k).store(column + k * kRow);
            drop(next, k + 1).store(column + (k + 1) * kRow);
          } else {
            store_pairs(drop(p, k), drop(next, k + 1), (W*)column + k / 2 * kRow);
          }
        }
        if (k < end) {
          const V p = probability(k);
          sum[0] = sum[0] + p;
          if constexpr (kPer == 1)
            drop(p, k).store(column + k * kRow);
          else
            store_pairs(drop(p, k), V::set(0), (W*)column + k / 2 * kRow);
          ++k;
        }
        block = block + (sum[0] + sum[1]);
      }
      const V before = V::load(l + v * V::L) * rescale[v], total = before + block;
      const V added = total - before, rounded = (before - (total - added)) + (block - added);
      total.store(l + v * V::L);
      fma(V::load(l_low + v * V::L), rescale[v], rounded).store(l_low + v * V::L);
      if constexpr (kJoined)
        for (k = keys; k < ends[vectors - 1]; ++k) V::set(0).store(column + k * kRow);
    }
  }

  // The keys k0 + [0, keys) for the vectors [begin, begin + n) of the block.
  static void panel(const Attention& a, const Workspace& w, const ScoreTile<V>& scores, int64_t k0, int64_t keys,
                    int64_t begin, int64_t n, Broadcast<W> key, Broadcast<W> value) {
    const int64_t q = begin * V::L, q0 = scores.q0 + q;
    const Range range = visible_keys(a, q0, n * V::L);
    if (range.begin >= k0 + keys || range.end <= k0) return;
    keys = clamp(range.end - k0, 0, keys);
    const bool plain = scores.plain();
    int64_t ends[kPanel], first;  // of the keys that a vector of queries has scores for
    for (int64_t k = 0, end; k < keys; k = end) {
      end = run_end<V>(a, q0, k0 + k, k0 + keys, n, first) - k0;
      const int64_t at = q + first * V::L;
      Blocks::product_along_d(a, end - k, n - first, key.at(k, 0), w.q + at, Blocks::words(a.D), w.s + k * kRow + at);
      if (!plain || scores.cut(k0 + k, end - k, at, (n - first) * V::L))
        scores.finish(w.s, k0, k, end, begin + first, begin + n);
      for (int64_t v = k == 0 ? 0 : first; v < n; ++v) ends[v] = v < first ? 0 : end;
    }
    V rescale[kPanel];
    exponentials(w.s + q, ends, n, plain ? scores.scale : T(1), a.dropout_p > 0 ? w.keep + q : nullptr, w.m + q,
                 w.l + q, w.l_low + q, rescale);

    // Vectors with the same keys share a product.
    for (int64_t v = 0, next; v < n; v = next) {
      for (next = v + 1; next < n && (kJoined || ends[next] == ends[v]);) ++next;
      const int64_t at = q + v * V::L;
      product<Start::kScale, V>(a.Dv, next - v, value, (const W*)w.s + at, kRow, (ends[next - 1] + kPer - 1) / kPer,
                                w.o + at, kRow, rescale + v);
    }
  }

  static void run(const Attention& a, int64_t item, void* memory) {
    const int64_t bh = item / groups(a), b = bh / a.H, h = bh % a.H, kv = h / (a.H / a.Hkv);
    // Long rows first: under a causal mask the last blocks have the most keys, and the shortest items should come last.
    const int64_t end = blocks(a) - item % groups(a) * together(a), begin = clamp(end - together(a), 0, end);
    const int64_t first = begin * kQueries, queries = clamp(a.T - first, 0, (end - begin) * kQueries);
    const Workspace w(a, memory, nullptr);
    for (int64_t i = 0; i < end - begin; ++i) prepare(a, w.of(a, i), b, h, first + i * kQueries);

    const Range range = visible_keys(a, first, queries);
    for (int64_t k0 = range.begin; k0 < range.end; k0 += kKeys) {
      const int64_t keys = clamp(range.end - k0, 0, kKeys);
      Broadcast<W> key{}, value{};
      for (int64_t i = 0; i < end - begin; ++i) {
        const int64_t q0 = first + i * kQueries, n = clamp(a.T - q0, 0, kQueries), vectors = (n + V::L - 1) / V::L;
        const Range seen = visible_keys(a, q0, n);
        if (seen.begin >= k0 + keys || seen.end <= k0) continue;
        const ScoreTile<V> scores{a, b, h, q0, n, vectors, T(a.scale), w.mask, w.bias, w.keep, nullptr};
        if (!scores.load(k0, clamp(seen.end - k0, 0, keys))) continue;
        if (!key.data) {
          key = Blocks::along_d(a.k, b, kv, k0, keys, a.D, w.keys);
          value = Blocks::along_keys(a.v, b, kv, k0, keys, a.Dv, w.values);
        }
        for (int64_t v = 0; v < vectors; v += kPanel)
          panel(a, w.of(a, i), scores, k0, keys, v, clamp(vectors - v, 0, kPanel), key, value);
      }
    }
    for (int64_t i = 0; i < end - begin; ++i) finish(a, w.of(a, i), b, h, first + i * kQueries);
  }

  static void prepare(const Attention& a, const Workspace& w, int64_t b, int64_t h, int64_t q0) {
    const int64_t n = clamp(a.T - q0, 0, kQueries);
    Blocks::pack_transposed(Blocks::row(a.q, b, h, q0), a.q.t, a.q.d, n, a.D, w.q, w.scratch);
    memset(w.o, 0, a.Dv * kRow * sizeof(T));
    for (int64_t i = 0; i < kQueries; ++i)
      w.m[i] = T(-1e30), w.l[i] = w.l_low[i] = 0;  // finite: -inf - -inf would be a NaN
  }

  // The sink is one more score, without a value. l becomes what the sums of values are multiplied with.
  static void finish(const Attention& a, const Workspace& w, int64_t b, int64_t h, int64_t q0) {
    const int64_t n = clamp(a.T - q0, 0, kQueries);
    double* lse = a.lse ? a.lse + b * a.lse_b + h * a.lse_h + q0 : nullptr;
    for (int64_t i = 0; i < n; ++i) {
      double m = w.m[i], l = double(w.l[i]) + w.l_low[i], rescaled = 1;
      if (a.sink) {
        const double sink = ((const T*)a.sink)[h], top = sink > m ? sink : m;
        rescaled = ::exp(m - top);
        l = l * rescaled + ::exp(sink - top);
        m = top;
      }
      if (lse) lse[i] = l == 0 ? -INFINITY : m + log(l);
      w.l[i] = l == 0 ? T(0) : T(rescaled / l);
    }
    Blocks::unpack_transposed(w.o, w.l, n, a.Dv, (S*)Blocks::row(a.o, b, h, q0), a.o.t, a.o.d);
  }
};

template <class V, class S, class W>
int64_t attention_fwd_items(const Attention& a) {
  return AttentionFwd<V, S, W>::items(a);
}
template <class V, class S, class W>
int64_t attention_fwd_bytes(const Attention& a) {
  return AttentionFwd<V, S, W>::bytes(a);
}
template <class V, class S, class W>
void attention_fwd(const Attention& a, int64_t item, void* workspace) {
  AttentionFwd<V, S, W>::run(a, item, workspace);
}

constexpr AttentionKernels kTable = {PER_TYPE_AND_WORD(attention_fwd_items), PER_TYPE_AND_WORD(attention_fwd_bytes),
                                     PER_TYPE_AND_WORD(attention_fwd)};
