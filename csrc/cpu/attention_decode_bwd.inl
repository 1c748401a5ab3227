// Attention backward of a few queries on many keys, where a vector of queries would be mostly empty: the rows of
// attention_rows.inl, one pass over keys and values. A pass has all rows that see its keys, so what it adds to dk and
// dv is all there is to add, and goes straight to memory.

#include "attention_rows.inl"

template <class V, class S, class W>
struct AttentionDecodeBwd : AttentionRows<V, S, W> {
  using Rows = AttentionRows<V, S, W>;
  using Rows::kKeys, Rows::kSplit, Rows::rows;
  using typename Rows::Blocks, typename Rows::T, typename Rows::X;
  static constexpr int64_t kMostRows = 64;  // the rows of q and grad_o stay in the caches beside those of a pass

  struct Workspace {
    typename Rows::Left q, grad_o;
    T *q_rows, *grad_o_rows;          // padded to whole vectors with zeros
    T *p, *ds, *dq, *ones;            // p and ds are [rows, kKeys]
    T *lse, *lse_low, *delta, *dlse;  // of every row
    double *total, *pdp;              // sums over keys of p and of p * dp
    W* ds_words;                      // ds where a word is one number
    const S *keys[kKeys], *values[kKeys];
    Workspace(const Attention& a, void* memory, int64_t* bytes) {
      Arena arena{(char*)memory, 0};
      const int64_t R = rows(a);
      q = Rows::Left::take(arena, R, a.D), grad_o = Rows::Left::take(arena, R, a.Dv);
      q_rows = arena.take<T>(R * Blocks::padded(a.D)), grad_o_rows = arena.take<T>(R * Blocks::padded(a.Dv));
      p = arena.take<T>(R * kKeys), ds = arena.take<T>(R * kKeys);
      dq = arena.take<T>(R * a.D), ones = arena.take<T>(R);
      lse = arena.take<T>(R), lse_low = arena.take<T>(R), delta = arena.take<T>(R), dlse = arena.take<T>(R);
      total = arena.take<double>(R), pdp = arena.take<double>(R);
      ds_words = X::kPer == 1 ? (W*)ds : arena.take<W>(R * kKeys / X::kPer);
      if (bytes) *bytes = arena.used;
    }
  };
  static int64_t bytes(const Attention& a) {
    int64_t n;
    Workspace(a, nullptr, &n);
    return n;
  }

  // Into how many ranges the keys are cut; 0 for what attention_bwd does, or does better: more queries, gradients of a
  // bias, and rows that see few of many keys (sees_few), for which delta would have to be summed over ranges.
  static int64_t ranges(const Attention& a) {
    constexpr int64_t kFewQueries = V::L < 8 ? V::L : 8;
    if (a.Hkv == 0 || a.T == 0 || a.T > kFewQueries || rows(a) > kMostRows || a.dropout_p > 0 || a.dbias.data) return 0;
    if (a.k.d != 1 || a.v.d != 1 || a.dk.d != 1 || a.dv.d != 1) return 0;
    if (Rows::splits(a) > 1 && !a.partial_keys)
      for (int64_t b = 0; b < (a.mask.b ? a.B : 1); ++b)
        for (int64_t h = 0; h < (a.mask.h ? a.H : 1); ++h)
          for (int64_t t = 0; t < a.T; ++t)
            if (sees_few(a, b, h, t)) return 0;
    return Rows::splits(a);
  }

  static void prepare(const Attention& a, const Workspace& w, int64_t b, int64_t kv) {
    const int64_t D = Blocks::padded(a.D), Dv = Blocks::padded(a.Dv);
    Rows::pack(a, a.q, b, kv, w.q);
    Rows::pack(a, a.grad_o, b, kv, w.grad_o);
    for (int64_t r = 0; r < rows(a); ++r) {
      const int64_t h = Rows::head(a, kv, r), t = r % a.T, at = b * a.lse_b + h * a.lse_h + t;
      const S *o = Blocks::row(a.o, b, h, t), *g = Blocks::row(a.grad_o, b, h, t);
      Blocks::pack_rows(Blocks::row(a.q, b, h, t), 0, a.q.d, 1, a.D, w.q_rows + r * D);
      Blocks::pack_rows(g, 0, a.grad_o.d, 1, a.Dv, w.grad_o_rows + r * Dv);
      double delta = 0;
      for (int64_t d = 0; d < a.Dv; ++d) delta += double(widen(o[d * a.o.d])) * double(widen(g[d * a.grad_o.d]));
      w.delta[r] = T(delta);
      w.dlse[r] = a.dlse ? T(a.dlse[at]) : T(0);
      w.ones[r] = 1;
      keep_lse(w, r, a.lse[at]);
    }
    for (int64_t i = 0; i < rows(a) * a.D; ++i) w.dq[i] = 0;
  }
  static void keep_lse(const Workspace& w, int64_t r, double lse) {
    lse = lse == -INFINITY ? 1e30 : lse;  // of a query that saw nothing every probability underflows to 0
    w.lse[r] = T(lse), w.lse_low[r] = T(lse - T(lse));
  }

  // q.k and grad_o.v of a pass.
  static void products(const Attention& a, Workspace& w, int64_t b, int64_t kv, int64_t k0, int64_t keys) {
    Rows::find_rows(a.k, b, kv, k0, keys, w.keys);
    Rows::find_rows(a.v, b, kv, k0, keys, w.values);
    Rows::in_groups(rows(a), [&](auto n, int64_t r) {
      constexpr int N = decltype(n)::value;
      Rows::template products<N>(w.q, r, w.keys, keys, w.values, a.Dv, w.p);
      Rows::template products<N>(w.grad_o, r, w.values, keys, w.values, 0, w.ds);
    });
  }

  struct Probability {
    typename Rows::RowScores score;
    V scale, shift, low;
    Probability(const Attention& a, const Workspace& w, int64_t b, int64_t kv, int64_t r, int64_t k0, int64_t keys)
        : score(a, b, kv, r, k0, keys),
          scale(V::set(score.raw ? T(a.scale) : T(1))),
          shift(V::set(-w.lse[r])),
          low(V::set(w.lse_low[r])) {}
    V operator()(V dot, int64_t k, T* slope = nullptr) const {
      return exp_fma(score(dot, k, slope), scale, shift, low);
    }
  };

  // Where all keys are in one range delta is the sum of p * dp, and p is divided by its own sum, as in attention_bwd.
  static void sum_scores(const Attention& a, const Workspace& w, int64_t b, int64_t kv, int64_t r, int64_t k0,
                         int64_t keys) {
    const Probability probability(a, w, b, kv, r, k0, keys);
    for (int64_t k = 0; k < keys; k += V::L) {
      T p[V::L];
      probability(V::load(w.p + r * kKeys + k), k).store(p);
      for (int64_t i = 0; i < V::L; ++i) w.total[r] += p[i], w.pdp[r] += double(p[i]) * double(w.ds[r * kKeys + k + i]);
    }
  }
  static void use_sums(const Attention& a, const Workspace& w, int64_t b, int64_t kv, int64_t r) {
    const int64_t h = Rows::head(a, kv, r);
    const double lse = a.lse[b * a.lse_b + h * a.lse_h + r % a.T];
    if (lse == -INFINITY) return;
    const double total = w.total[r] + (a.sink ? ::exp(double(((const T*)a.sink)[h]) - lse) : 0);
    w.delta[r] = T(w.pdp[r] / total);
    keep_lse(w, r, lse + log(total));
  }

  // p, and scale * d(score) from dp, of row r.
  static NOINLINE void score_gradients(const Attention& a, const Workspace& w, int64_t b, int64_t kv, int64_t r,
                                       int64_t k0, int64_t keys) {
    const Probability probability(a, w, b, kv, r, k0, keys);
    const V delta = V::set(w.delta[r]), dlse = V::set(w.dlse[r]), scale = V::set(T(a.scale));
    T *s = w.p + r * kKeys, *ds = w.ds + r * kKeys;
    V pdp = V::set(0);
    for (int64_t k = 0; k < keys; k += V::L) {
      T slope[V::L];
      const V p = probability(V::load(s + k), k, slope), dp = V::load(ds + k);
      pdp = fma(p, dp, pdp);
      V x = dp - delta;  // dlse apart: it may be much smaller than both
      if (a.dlse) x = x + dlse;
      x = p * x * scale;
      if (a.softcap > 0) x = x * V::load(slope);
      p.store(s + k);
      x.store(ds + k);
      if constexpr (X::kPer == 2) x.store((S*)w.ds_words + r * kKeys + k);
    }
    w.pdp[r] += sum(pdp);
  }

  // to[k][d] = sum over rows of weight[r][k] row[r][d], for K keys and M vectors from d, the last of which may reach
  // past the end.
  template <int K, int M>
  static void write_keys(const T* weight, const T* row, int64_t R, int64_t width, int64_t d, int64_t D, S* to,
                         int64_t to_row) {
    V sum[K][M];
    UNROLLED for (int k = 0; k < K; ++k) UNROLLED for (int i = 0; i < M; ++i) sum[k][i] = V::set(0);
    for (int64_t r = 0; r < R; ++r) {
      V x[M];
      UNROLLED for (int i = 0; i < M; ++i) x[i] = V::load(row + r * width + d + i * V::L);
      UNROLLED for (int k = 0; k < K; ++k) {
        const V p = V::set(weight[r * kKeys + k]);
        UNROLLED for (int i = 0; i < M; ++i) sum[k][i] = fma(p, x[i], sum[k][i]);
      }
    }
    UNROLLED for (int k = 0; k < K; ++k) UNROLLED for (int i = 0; i < M; ++i) {
      S* p = to + k * to_row + d + i * V::L;
      if (d + (i + 1) * V::L <= D)
        sum[k][i].store(p);
      else
        store(sum[k][i], p, D - d - i * V::L);
    }
  }
  template <int K>
  static NOINLINE void write_all(const T* weight, const T* row, int64_t R, int64_t D, S* to, int64_t to_row) {
    const int64_t width = Blocks::padded(D);
    int64_t d = 0;
    for (; d + 2 * V::L <= width; d += 2 * V::L) write_keys<K, 2>(weight, row, R, width, d, D, to, to_row);
    for (; d < width; d += V::L) write_keys<K, 1>(weight, row, R, width, d, D, to, to_row);
  }
  // Rows [k0, k0 + keys) of dk or dv.
  static void write(const Heads& x, int64_t b, int64_t kv, int64_t k0, int64_t keys, const T* weight, const T* row,
                    int64_t R, int64_t D) {
    S* to = (S*)Blocks::row(x, b, kv, k0);
    int64_t k = 0;
    for (; k + 4 <= keys; k += 4) write_all<4>(weight + k, row, R, D, to + k * x.t, x.t);
    for (; k < keys; ++k) write_all<1>(weight + k, row, R, D, to + k * x.t, x.t);
  }

  static void run(const Attention& a, int64_t item, void* memory) {
    const int64_t split = item % a.chunks, head = item / a.chunks, b = head / a.Hkv, kv = head % a.Hkv, R = rows(a);
    const int64_t first = split * kSplit, last = clamp(first + kSplit, 0, a.S);
    const Range visible = visible_keys(a, 0, a.T);
    const Range seen{clamp(visible.begin, first, last), clamp(visible.end, first, last)};
    Workspace w(a, memory, nullptr);
    prepare(a, w, b, kv);
    if (a.chunks == 1 && !a.partial_keys) {
      for (int64_t r = 0; r < R; ++r) w.total[r] = w.pdp[r] = 0;
      for (int64_t k0 = seen.begin; k0 < seen.end; k0 += kKeys) {
        const int64_t keys = clamp(seen.end - k0, 0, kKeys);
        products(a, w, b, kv, k0, keys);
        for (int64_t r = 0; r < R; ++r) sum_scores(a, w, b, kv, r, k0, keys);
      }
      for (int64_t r = 0; r < R; ++r) use_sums(a, w, b, kv, r);
    }
    auto no_gradient = [&](int64_t begin, int64_t end) {  // of keys that no query sees
      if (begin >= end) return;
      write(a.dk, b, kv, begin, end - begin, nullptr, nullptr, 0, a.D);
      write(a.dv, b, kv, begin, end - begin, nullptr, nullptr, 0, a.Dv);
    };
    no_gradient(first, seen.begin);
    no_gradient(seen.end, last);
    for (int64_t r = 0; r < R; ++r) w.pdp[r] = 0;
    for (int64_t k0 = seen.begin; k0 < seen.end; k0 += kKeys) {
      const int64_t keys = clamp(seen.end - k0, 0, kKeys);
      products(a, w, b, kv, k0, keys);
      for (int64_t r = 0; r < R; ++r) score_gradients(a, w, b, kv, r, k0, keys);
      write(a.dk, b, kv, k0, keys, w.ds, w.q_rows, R, a.D);
      write(a.dv, b, kv, k0, keys, w.p, w.grad_o_rows, R, a.Dv);
      Rows::in_groups(R, [&](auto n, int64_t r) {
        Rows::template add_all_rows<decltype(n)::value>(w.ds_words, w.keys, r, 0, keys, a.D, w.ones, w.keys, 0, w.dq);
      });
    }
    write_dq(a, w, b, kv, split);
    for (int64_t r = 0; a.sink && r < R; r += a.T) {
      const int64_t h = Rows::head(a, kv, r);
      a.dsink_partial[(b * a.chunks + split) * a.H + h] = sink_gradient<T>(
          a, b, h, split, {0, a.T}, [&](int64_t t) { return double(w.lse[r + t]) + w.lse_low[r + t]; },
          [&](int64_t t) { return w.pdp[r + t]; });
    }
  }

  static void write_dq(const Attention& a, const Workspace& w, int64_t b, int64_t kv, int64_t split) {
    for (int64_t r = 0; r < rows(a); ++r) {
      const int64_t h = Rows::head(a, kv, r), t = r % a.T;
      const T* dq = w.dq + r * a.D;
      if (a.chunks > 1) {
        memcpy((T*)a.dq_partial + (((b * a.H + h) * a.chunks + split) * a.T + t) * a.D, dq, a.D * sizeof(T));
      } else {
        S* to = (S*)Blocks::row(a.dq, b, h, t);
        for (int64_t d = 0; d < a.D; ++d) narrow(dq[d], to[d * a.dq.d]);
      }
    }
  }
};

template <class V, class S, class W>
int64_t attention_decode_bwd_ranges(const Attention& a) {
  return AttentionDecodeBwd<V, S, W>::ranges(a);
}
template <class V, class S, class W>
int64_t attention_decode_bwd_bytes(const Attention& a) {
  return AttentionDecodeBwd<V, S, W>::bytes(a);
}
template <class V, class S, class W>
void attention_decode_bwd(const Attention& a, int64_t item, void* workspace) {
  AttentionDecodeBwd<V, S, W>::run(a, item, workspace);
}

constexpr AttentionDecodeBwdKernels kTable = {PER_TYPE_AND_WORD(attention_decode_bwd_ranges),
                                              PER_TYPE_AND_WORD(attention_decode_bwd_bytes),
                                              PER_TYPE_AND_WORD(attention_decode_bwd)};
