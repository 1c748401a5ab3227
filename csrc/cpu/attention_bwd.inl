// Attention backward. With p = exp(score - lse), dp = do.v and delta = sum(o * do) - dlse per query,
//   dscore = p * (dp - delta),  dv = p^T do,  dq = scale * dscore k,  dk = scale * dscore^T q:
// five products and no transposition of anything of size T x S. One item is a key head and a range of keys, so that
// every sum is made by one thread in one order. It goes over the queries in pieces, so that what is held of them,
// packed and as sums, is bounded, and over the keys in spans.

#include "attention_blocks.inl"

template <class V, class S, class W>
struct AttentionBwd : AttentionBlocks<V, S, W> {
  using Blocks = AttentionBlocks<V, S, W>;
  using Blocks::kJoined, Blocks::kPanel, Blocks::kPer, Blocks::kQueries, Blocks::kRow, Blocks::kVectors;
  using typename Blocks::T;
  static constexpr int64_t kKeys = 48;  // the tiles of p and dscore are 12 KiB each

  static int64_t blocks(const Attention& a) { return (a.T + kQueries - 1) / kQueries; }
  static int64_t chunk(const Attention& a) {  // keys in a range, a multiple of the tile
    const int64_t tiles = (a.S + kKeys - 1) / kKeys;
    return (tiles + a.chunks - 1) / a.chunks * kKeys;
  }

  // Keys whose rows, gradients and packed words stay in L2 while the blocks of queries pass by.
  static int64_t span(const Attention& a) {
    constexpr int64_t kBytes = 192 << 10;
    const int64_t row = 2 * (Blocks::padded(a.D) + Blocks::padded(a.Dv)) * int64_t(sizeof(T));
    return clamp(kBytes / (row * kKeys), 1, 8) * kKeys;
  }
  // Queries in a piece, a multiple of the block: many beside a span, so that the keys of one are seldom fetched again.
  static int64_t piece(const Attention& a) {
    constexpr int64_t kBytes = 1 << 20;
    const int64_t sides = Blocks::words(a.D) + Blocks::words(a.Dv);
    const int64_t block = (kRow + kQueries) * sides * int64_t(sizeof(W)) + kRow * a.D * int64_t(sizeof(T));
    return clamp(kBytes / block, 1, blocks(a)) * kQueries;
  }

  struct Rows {  // right operand of a product that sums over queries
    const W* data;
    int64_t row;
  };
  struct Sums {  // of a key's gradient, a row each
    T* data;
    int64_t row;
    Sums at(int64_t k) const { return {data + k * row, row}; }
  };
  // Whether rows of x are as such an operand, or such sums, have to be: whole vectors of the compute type.
  static bool whole(const Heads& x, int64_t D) { return sizeof(S) == sizeof(T) && x.d == 1 && D % V::L == 0; }

  // For a piece of the queries: q and do transposed (for the scores and dp), as rows (for dk and dv), dq transposed.
  struct Workspace {
    W *q, *grad_o, *q_rows, *grad_o_rows, *keys, *values, *key_rows, *scratch;
    T *s, *dp, *dq, *dk, *dv, *lse, *lse_low, *delta, *dlse, *mask, *bias, *keep, *slope;
    W *p_words, *ds_words;
    double* pdp;          // with a sink: the sum of p * dp over the keys so far
    Range queries{0, 0};  // the piece
    Rows q_right{}, grad_o_right{};
    Workspace(const Attention& a, void* memory, int64_t* bytes) {
      Arena arena{(char*)memory, 0};
      const int64_t rows = piece(a), Dw = Blocks::words(a.D), Dvw = Blocks::words(a.Dv);
      const int64_t D = Blocks::padded(a.D), Dv = Blocks::padded(a.Dv), keys_here = chunk(a), keys_packed = span(a);
      s = arena.take<T>(kKeys * kRow);
      dp = arena.take<T>(kKeys * kRow);
      p_words = arena.take<W>(kPer == 1 ? 0 : kKeys * kRow / 2);
      ds_words = arena.take<W>(kPer == 1 ? 0 : kKeys * kRow / 2);
      keys = arena.take<W>(keys_packed * Dw);
      values = arena.take<W>(keys_packed * Dvw);
      key_rows = arena.take<W>(keys_packed / kPer * Blocks::spread(a.D));
      scratch = arena.take<W>(kPer == 2 ? kQueries * (Dw > Dvw ? Dw : Dvw) : 0);
      lse = arena.take<T>(rows);
      lse_low = arena.take<T>(rows);
      delta = arena.take<T>(rows);
      dlse = arena.take<T>(a.dlse ? rows : 0);
      pdp = arena.take<double>(a.sink ? rows : 0);
      q = arena.take<W>(rows / kQueries * kRow * Dw);
      grad_o = arena.take<W>(rows / kQueries * kRow * Dvw);
      q_rows = arena.take<W>(whole(a.q, a.D) ? 0 : rows / kPer * D);
      grad_o_rows = arena.take<W>(whole(a.grad_o, a.Dv) ? 0 : rows / kPer * Dv);
      dq = arena.take<T>(rows / kQueries * kRow * a.D);
      dk = arena.take<T>(whole(a.dk, a.D) ? 0 : keys_here * D);
      dv = arena.take<T>(whole(a.dv, a.Dv) ? 0 : keys_here * Dv);
      mask = arena.take<T>(a.mask.data ? kKeys * kRow : 0);
      bias = arena.take<T>(a.bias.data ? kKeys * kRow : 0);
      keep = arena.take<T>(a.dropout_p > 0 ? kKeys * kRow : 0);
      slope = arena.take<T>(a.softcap > 0 ? kKeys * kRow : 0);
      if (bytes) *bytes = arena.used;
    }
    int64_t row(int64_t q) const { return q - queries.begin; }
    // Where query q's block begins in a transposed buffer, for every row of it.
    int64_t transposed(int64_t q) const { return row(q) / kQueries * kRow; }
  };
  static int64_t bytes(const Attention& a) {
    int64_t n;
    Workspace(a, nullptr, &n);
    return n;
  }

  // Rows of the piece as the right operand of a product that sums over queries: padded to whole vectors, zeros past row
  // n.
  static Rows right_rows(const Heads& x, int64_t b, int64_t h, Range queries, int64_t D, W* buffer) {
    const S* p = Blocks::row(x, b, h, queries.begin);
    const int64_t n = queries.end - queries.begin, width = Blocks::padded(D);
    if constexpr (sizeof(S) == sizeof(W))
      if (whole(x, D)) return {(const W*)p, x.t};
    if constexpr (kPer == 1) {
      Blocks::pack_rows(p, x.t, x.d, n, D, buffer);
    } else {
      Blocks::pack_row_words(p, x.t, x.d, n, D, buffer, width);
      for (int64_t i = 0; i < (n + 1) / 2; ++i)
        for (int64_t d = D; d < width; ++d) buffer[i * width + d] = W{0};
    }
    return {buffer, width};
  }

  // p = exp(score - lse) of one vector of queries, from row `i` of the piece on.
  struct Probability {
    V scale, shift, low;
    Probability(const Workspace& w, int64_t i, T c)
        : scale(V::set(c)), shift(V::set(0) - V::load(w.lse + i)), low(V::load(w.lse_low + i)) {}
    V operator()(const T* score) const { return exp_fma(V::load(score), scale, shift, low); }
  };
  static void keep_lse(const Workspace& w, int64_t i, double lse) {
    w.lse[i] = T(lse);
    w.lse_low[i] = T(lse - T(lse));
  }

  // delta = sum(o * do) is not the sum of p * dp that it stands for: o and dp were rounded apart from each other. Where
  // a query sees few keys that is most of dscore's error (of a single key, all of it: it is 0), and where scores are
  // few PyTorch sums p * dp. There it is summed here too, and with it p, which is then divided by its own sum. Of some
  // of the keys neither sum is known.
  static constexpr int64_t kFewQueries = 16, kShort = 512;
  static bool sums_scores(const Attention& a, int64_t b, int64_t h, int64_t t, int64_t n) {
    if (a.partial_keys) return false;
    if (a.T <= kFewQueries && a.S <= kShort) return true;
    for (int64_t i = 0; i < n; ++i)
      if (sees_few(a, b, h, t + i)) return true;
    return false;
  }

  // delta and lse of the vector of queries from q on, summed over the keys.
  static void sum_scores(const Attention& a, const Workspace& w, int64_t b, int64_t h, int64_t q) {
    const int64_t kv = h / (a.H / a.Hkv), n = clamp(a.T - q, 0, V::L);
    const ScoreTile<V> scores{a, b, h, q, n, 1, T(a.scale), w.mask, w.bias, w.keep, nullptr};
    double total[V::L] = {}, delta[V::L] = {};
    const Range range = visible_keys(a, q, n);
    for (int64_t k0 = range.begin; k0 < range.end; k0 += kKeys) {
      const int64_t keys = clamp(range.end - k0, 0, kKeys);
      if (!scores.load(k0, keys)) continue;
      const Broadcast<W> key = Blocks::along_d(a.k, b, kv, k0, keys, a.D, w.keys);
      const Broadcast<W> value = Blocks::along_d(a.v, b, kv, k0, keys, a.Dv, w.values);
      tile_scores(a, w, scores, k0, 0, keys, 0, 1, key, value);
      const Probability probability(w, w.row(q), scores.plain() ? scores.scale : T(1));
      for (int64_t k = 0; k < keys; ++k) {
        T p[V::L], dp[V::L];
        probability(w.s + k * kRow).store(p);
        (a.dropout_p > 0 ? V::load(w.dp + k * kRow) * V::load(w.keep + k * kRow) : V::load(w.dp + k * kRow)).store(dp);
        for (int64_t i = 0; i < V::L; ++i) {
          total[i] += p[i];
          delta[i] += double(p[i]) * double(dp[i]);
        }
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const double lse = a.lse[b * a.lse_b + h * a.lse_h + q + i];
      if (lse == -INFINITY) continue;
      if (a.sink) total[i] += ::exp(double(((const T*)a.sink)[h]) - lse);
      w.delta[w.row(q) + i] = T(delta[i] / total[i]);
      keep_lse(w, w.row(q) + i, lse + log(total[i]));
    }
  }

  static void prepare_queries(const Attention& a, Workspace& w, int64_t b, int64_t h, Range queries) {
    const int64_t Dw = Blocks::words(a.D), Dvw = Blocks::words(a.Dv);
    w.queries = queries;
    w.q_right = right_rows(a.q, b, h, queries, a.D, w.q_rows);
    w.grad_o_right = right_rows(a.grad_o, b, h, queries, a.Dv, w.grad_o_rows);
    for (int64_t q0 = queries.begin; q0 < queries.end; q0 += kQueries) {
      const int64_t n = clamp(queries.end - q0, 0, kQueries), at = b * a.lse_b + h * a.lse_h + q0;
      const S *q = Blocks::row(a.q, b, h, q0), *g = Blocks::row(a.grad_o, b, h, q0), *o = Blocks::row(a.o, b, h, q0);
      Blocks::pack_transposed(q, a.q.t, a.q.d, n, a.D, w.q + w.transposed(q0) * Dw, w.scratch);
      Blocks::pack_transposed(g, a.grad_o.t, a.grad_o.d, n, a.Dv, w.grad_o + w.transposed(q0) * Dvw, w.scratch);
      const double* lse = a.lse + at;
      for (int64_t i = 0; i < kQueries; ++i) {
        const int64_t row = w.row(q0) + i;
        w.delta[row] = i >= n ? T(0) : sum_over<V>(a.Dv, [&](V s, int64_t d, int64_t lanes) {
          return fma(Blocks::load_row(o + i * a.o.t + d * a.o.d, a.o.d, lanes),
                     Blocks::load_row(g + i * a.grad_o.t + d * a.grad_o.d, a.grad_o.d, lanes), s);
        });
        if (a.dlse) w.dlse[row] = i < n ? T(a.dlse[at + i]) : T(0);
        // A query that saw nothing has lse = -inf: as +1e30 every probability underflows to 0.
        keep_lse(w, row, i >= n ? 0 : lse[i] == -INFINITY ? 1e30 : lse[i]);
      }
      for (int64_t i = 0; i < n; i += V::L)
        if (sums_scores(a, b, h, q0 + i, clamp(n - i, 0, V::L))) sum_scores(a, w, b, h, q0 + i);
    }
  }

  // The one place where the gradients of scores are made: s becomes p as dv sees it, dp becomes d(score), of the score
  // that bias was added to; a soft-cap's slope is applied by cap_gradients, once the bias has had its gradient.
  static void score_gradients(const Workspace& w, int64_t begin, int64_t end, int64_t first, int64_t last, T scale,
                              const T* keep, bool has_dlse, bool has_sink, int64_t q0) {
    for (int64_t v = first; v < last; ++v) {
      const int64_t q = w.row(q0) + v * V::L;
      const Probability probability(w, q, scale);
      const V delta = V::load(w.delta + q), dlse = has_dlse ? V::load(w.dlse + q) : V::set(0);
      V pdp = V::set(0);
      for (int64_t k = begin; k < end; ++k) {
        const int64_t place = k * kRow + v * V::L;
        const V p = probability(w.s + place);
        V dp = V::load(w.dp + place), kept = p;
        if (keep) {
          dp = dp * V::load(keep + place);
          kept = p * V::load(keep + place);
        }
        kept.store(w.s + place);
        pdp = fma(p, dp, pdp);
        const V less = dp - delta;  // dlse apart: it may be much smaller than both
        (p * (has_dlse ? less + dlse : less)).store(w.dp + place);
      }
      if (has_sink) {
        T lanes[V::L];
        pdp.store(lanes);
        for (int64_t i = 0; i < V::L; ++i) w.pdp[q + i] += lanes[i];
      }
    }
  }
  static void cap_gradients(const Workspace& w, int64_t begin, int64_t end, int64_t first, int64_t last) {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t v = first; v < last; ++v) {
        T* ds = w.dp + k * kRow + v * V::L;
        (V::load(ds) * V::load(w.slope + k * kRow + v * V::L)).store(ds);
      }
  }

  // dbias (+)= d(score) of the keys k0 + [begin, end) and the queries of vectors [first, last). One item makes all
  // sums into an element of dbias, so their order is fixed. A is T, or double where many scores are summed into one
  // element.
  template <class A>
  static void add_bias_gradient(const Attention& a, const T* ds, const ScoreTile<V>& scores, int64_t k0, int64_t begin,
                                int64_t end, int64_t first, int64_t last) {
    const Scores& x = a.dbias;
    A* to = (A*)x.data + scores.b * x.b + scores.h * x.h + scores.q0 * x.t + k0 * x.s;
    for (int64_t q = first * V::L; q < scores.queries && q < last * V::L; q += V::L) {
      const int64_t m = clamp(scores.queries - q, 0, V::L);
      for (int64_t k = begin; k < end; k += V::L) {
        const int64_t n = clamp(end - k, 0, V::L);
        V r[V::L];
        for (int64_t j = 0; j < V::L; ++j) r[j] = j < n ? V::load(ds + (k + j) * kRow + q) : V::set(0);
        transpose(r);
        for (int64_t i = 0; i < m; ++i) {
          A* p = to + (q + i) * x.t + k * x.s;
          if constexpr (sizeof(A) == sizeof(T)) {
            if (x.s == 1) {
              store(a.dbias_adds ? r[i] + load<V>(p, n) : r[i], p, n);
              continue;
            }
          }
          T lanes[V::L];
          r[i].store(lanes);
          for (int64_t j = 0; j < n; ++j) p[j * x.s] = a.dbias_adds ? p[j * x.s] + lanes[j] : lanes[j];
        }
      }
    }
  }

  // p and dscore as words along queries (left operands of dv and dk), dscore also along keys (right operand of dq).
  static void to_words(const Workspace& w, int64_t begin, int64_t end, int64_t first, int64_t last) {
    for (int64_t k = begin; k < end; k += 2)
      for (int64_t v = first; v < last; ++v) {
        const int64_t at = k * kRow + v * V::L;
        const bool alone = k + 1 == end;
        const V none = V::set(0), d0 = V::load(w.dp + at), d1 = alone ? none : V::load(w.dp + at + kRow);
        V::load(w.s + at).store((S*)w.p_words + at);
        d0.store((S*)w.ds_words + at);
        if (!alone) {
          V::load(w.s + at + kRow).store((S*)w.p_words + at + kRow);
          d1.store((S*)w.ds_words + at + kRow);
        }
        store_pairs(d0, d1, (W*)w.dp + k / 2 * kRow + v * V::L);
      }
  }

  // Scores and dp of the keys k0 + [begin, end) and the vectors [first, last).
  static void tile_scores(const Attention& a, const Workspace& w, const ScoreTile<V>& scores, int64_t k0, int64_t begin,
                          int64_t end, int64_t first, int64_t last, Broadcast<W> key, Broadcast<W> value) {
    const int64_t block = scores.q0 / kQueries * kQueries, skip = scores.q0 - block + first * V::L;
    const int64_t Dw = Blocks::words(a.D), Dvw = Blocks::words(a.Dv), at = begin * kRow + first * V::L;
    const W *q = w.q + w.transposed(block) * Dw + skip, *grad_o = w.grad_o + w.transposed(block) * Dvw + skip;
    Blocks::product_along_d(a, end - begin, last - first, key.at(begin, 0), q, Dw, w.s + at);
    Blocks::product_along_d(a, end - begin, last - first, value.at(begin, 0), grad_o, Dvw, w.dp + at);
    if (!scores.plain() || scores.cut(k0 + begin, end - begin, first * V::L, (last - first) * V::L))
      scores.finish(w.s, k0, begin, end, first, last);
  }

  // p and the gradients of the scores of keys k0 + [0, keys) for the vectors [begin, last); ends[v] tells of how many
  // of these keys vector v has any.
  static void panel(const Attention& a, const Workspace& w, const ScoreTile<V>& scores, int64_t k0, int64_t keys,
                    int64_t begin, int64_t last, Broadcast<W> key, Broadcast<W> value, int64_t* ends) {
    const int64_t q0 = scores.q0 + begin * V::L, n = last - begin;
    const Range range = visible_keys(a, q0, n * V::L);
    keys = clamp(range.end - k0, 0, keys);
    for (int64_t v = begin; v < last; ++v) ends[v] = 0;
    int64_t first;
    for (int64_t k = 0, end; k < keys; k = end) {
      end = run_end<V>(a, q0, k0 + k, k0 + keys, n, first) - k0;
      first += begin;
      for (int64_t v = first; v < last; ++v) ends[v] = end;
      tile_scores(a, w, scores, k0, k, end, first, last, key, value);
      score_gradients(w, k, end, first, last, scores.plain() ? scores.scale : T(1), a.dropout_p > 0 ? w.keep : nullptr,
                      a.dlse, a.sink, scores.q0);
      if (a.dbias.data && a.dbias.type == kDouble) add_bias_gradient<double>(a, w.dp, scores, k0, k, end, first, last);
      if (a.dbias.data && a.dbias.type == kFloat) add_bias_gradient<T>(a, w.dp, scores, k0, k, end, first, last);
      if (a.softcap > 0) cap_gradients(w, k, end, first, last);
      if constexpr (kPer == 2) to_words(w, k, end, first, last);
    }
    if constexpr (kJoined)
      for (int64_t v = begin; v + 1 < last; ++v)
        for (; ends[v] < ends[last - 1]; ++ends[v]) {
          V::set(0).store(w.s + ends[v] * kRow + v * V::L);
          V::set(0).store(w.dp + ends[v] * kRow + v * V::L);
        }
  }

  static void tile_gradients(const Attention& a, const Workspace& w, const ScoreTile<V>& scores, int64_t k0,
                             int64_t keys, Broadcast<W> key, Broadcast<W> value, Broadcast<W> key_rows, Sums dk,
                             Sums dv) {
    const int64_t q0 = scores.q0, n = scores.queries, vectors = scores.vectors;
    const int64_t D = Blocks::padded(a.D), Dv = Blocks::padded(a.Dv);
    if (!scores.load(k0, keys)) return;
    int64_t ends[kVectors];
    for (int64_t v = 0; v < vectors; v += kPanel)
      panel(a, w, scores, k0, keys, v, v + clamp(vectors - v, 0, kPanel), key, value, ends);

    // Keys whose first vector of queries is the same share a product, and so do vectors with the same keys.
    const Broadcast<W> p{kPer == 2 ? w.p_words : (const W*)w.s, kRow / kPer, 1};
    const Broadcast<W> ds{kPer == 2 ? w.ds_words : (const W*)w.dp, kRow / kPer, 1};
    for (int64_t v = 0, k = 0; v < vectors; ++v) {
      if (ends[v] <= k) continue;
      const int64_t rows = ends[v] - k, skip = v * V::L, steps = (n - skip + kPer - 1) / kPer;
      auto add = [&](int64_t width, Broadcast<W> left, Rows right, Sums sums) {
        product<Start::kAdd, V>(rows, width / V::L, left.at(k, skip / kPer),
                                right.data + (w.row(q0) + skip) / kPer * right.row, right.row, steps, sums.at(k).data,
                                sums.row);
      };
      add(Dv, p, w.grad_o_right, dv);
      add(D, ds, w.q_right, dk);
      k = ends[v];
    }
    for (int64_t v = 0, next; v < vectors; v = next) {
      for (next = v + 1; next < vectors && ends[next] == ends[v];) ++next;
      const int64_t skip = v * V::L;
      product<Start::kAdd, V>(a.D, next - v, key_rows, (const W*)w.dp + skip, kRow, (ends[v] + kPer - 1) / kPer,
                              w.dq + w.transposed(q0) * a.D + skip, kRow);
    }
  }

  // An item is a range of keys of one key head; of all heads, or batches, whose scores share a bias that has a
  // gradient.
  static int64_t heads_apart(const Attention& a) { return a.dbias.data && a.dbias.h == 0 ? 1 : a.Hkv; }
  static int64_t batches_apart(const Attention& a) { return a.dbias.data && a.dbias.b == 0 ? 1 : a.B; }
  static int64_t items(const Attention& a) { return heads_apart(a) * batches_apart(a) * a.chunks; }

  static void run(const Attention& a, int64_t item, void* memory) {
    const int64_t part = item % a.chunks, group = item / a.chunks;
    const int64_t kv0 = group % heads_apart(a), b0 = group / heads_apart(a);
    for (int64_t b = b0; b < a.B; b += batches_apart(a))
      for (int64_t kv = kv0; kv < a.Hkv; kv += heads_apart(a)) run_head(a, b, kv, part, memory);
  }

  // What the keys [first, first + n) and the piece of head h's queries add to dq, dk and dv; dk and dv begin at the
  // first of these keys.
  static void add_keys(const Attention& a, const Workspace& w, int64_t b, int64_t h, int64_t kv, int64_t first,
                       int64_t n, Sums dk, Sums dv) {
    const Range seeing = seeing_queries(a, first, n);
    const int64_t begin = clamp(seeing.begin / kQueries * kQueries, w.queries.begin, w.queries.end);
    const int64_t end = clamp(seeing.end, begin, w.queries.end);
    if (begin == end) return;
    const Broadcast<W> key = Blocks::along_d(a.k, b, kv, first, n, a.D, w.keys);
    const Broadcast<W> value = Blocks::along_d(a.v, b, kv, first, n, a.Dv, w.values);
    const Broadcast<W> key_rows = Blocks::along_keys(a.k, b, kv, first, n, a.D, w.key_rows);
    for (int64_t q0 = begin; q0 < end; q0 += kQueries) {
      const int64_t queries = clamp(a.T - q0, 0, kQueries), vectors = (queries + V::L - 1) / V::L;
      const ScoreTile<V> scores{
          a, b, h, q0, queries, vectors, T(a.scale), w.mask, w.bias, w.keep, a.softcap > 0 ? w.slope : nullptr};
      const Range seen = visible_keys(a, q0, queries);
      for (int64_t k = 0; k < n; k += kKeys) {
        const int64_t keys = clamp(n - k, 0, kKeys), k0 = first + k;
        if (seen.begin < k0 + keys && k0 < seen.end)
          tile_gradients(a, w, scores, k0, keys, key.at(k, 0), value.at(k, 0), key_rows.at(0, k / kPer), dk.at(k),
                         dv.at(k));
      }
    }
  }

  // Zeros to add the gradients of keys [begin, end) to: in the gradient itself where that is possible.
  static Sums zeros(const Heads& x, int64_t b, int64_t kv, Range keys, int64_t D, T* buffer) {
    Sums sums{buffer, Blocks::padded(D)};
    if constexpr (sizeof(S) == sizeof(T))
      if (whole(x, D)) sums = {(T*)Blocks::row(x, b, kv, keys.begin), x.t};
    for (int64_t k = 0; k < keys.end - keys.begin; ++k) memset(sums.at(k).data, 0, Blocks::padded(D) * sizeof(T));
    return sums;
  }

  static void run_head(const Attention& a, int64_t b, int64_t kv, int64_t part, void* memory) {
    const int64_t begin = clamp(part * chunk(a), 0, a.S), end = clamp(begin + chunk(a), 0, a.S), G = a.H / a.Hkv;
    Workspace w(a, memory, nullptr);
    const Sums dk = zeros(a.dk, b, kv, {begin, end}, a.D, w.dk), dv = zeros(a.dv, b, kv, {begin, end}, a.Dv, w.dv);

    for (int64_t h = kv * G; h < (kv + 1) * G; ++h) {
      double dsink = 0;
      for (int64_t q0 = 0; q0 < a.T; q0 += piece(a)) {
        const Range queries{q0, clamp(q0 + piece(a), 0, a.T)};
        prepare_queries(a, w, b, h, queries);
        if (a.sink) memset(w.pdp, 0, piece(a) * sizeof(double));
        memset(w.dq, 0, piece(a) / kQueries * kRow * a.D * sizeof(T));
        for (int64_t k0 = begin; k0 < end; k0 += span(a))
          add_keys(a, w, b, h, kv, k0, clamp(end - k0, 0, span(a)), dk.at(k0 - begin), dv.at(k0 - begin));
        write_dq(a, w, b, h, part);
        if (a.sink)
          dsink += sink_gradient<T>(
              a, b, h, part, queries, [&](int64_t t) { return double(w.lse[w.row(t)]) + w.lse_low[w.row(t)]; },
              [&](int64_t t) { return w.pdp[w.row(t)]; });
      }
      if (a.sink) a.dsink_partial[(b * a.chunks + part) * a.H + h] = dsink;
    }
    write_rows(dk, end - begin, a.D, T(a.scale), a.dk, b, kv, begin);
    write_rows(dv, end - begin, a.Dv, T(1), a.dv, b, kv, begin);
  }

  static void write_dq(const Attention& a, const Workspace& w, int64_t b, int64_t h, int64_t part) {
    T factor[kQueries];
    for (T& f : factor) f = T(a.scale);
    for (int64_t q0 = w.queries.begin; q0 < w.queries.end; q0 += kQueries) {
      const int64_t n = clamp(w.queries.end - q0, 0, kQueries);
      const T* dq = w.dq + w.transposed(q0) * a.D;
      if (a.chunks == 1) {
        Blocks::unpack_transposed(dq, factor, n, a.D, (S*)Blocks::row(a.dq, b, h, q0), a.dq.t, a.dq.d);
      } else {
        T* to = (T*)a.dq_partial + (((b * a.H + h) * a.chunks + part) * a.T + q0) * a.D;
        AttentionBlocks<V, T, W>::unpack_transposed(dq, factor, n, a.D, to, a.D, 1);
      }
    }
  }

  static void write_rows(Sums sums, int64_t n, int64_t D, T factor, const Heads& x, int64_t b, int64_t h, int64_t t0) {
    if (factor == 1 && (const void*)sums.data == Blocks::row(x, b, h, t0)) return;
    const V f = V::set(factor);
    for (int64_t i = 0; i < n; ++i) {
      S* to = (S*)Blocks::row(x, b, h, t0 + i);
      for_vectors<V>(D, [&](int64_t d, int64_t lanes) {
        const V value = V::load(sums.at(i).data + d) * f;
        if (x.d == 1) return store(value, to + d, lanes);
        T numbers[V::L];
        value.store(numbers);
        for (int64_t j = 0; j < lanes; ++j) narrow(numbers[j], to[(d + j) * x.d]);
      });
    }
  }
};

template <class V, class S, class W>
int64_t attention_bwd_items(const Attention& a) {
  return AttentionBwd<V, S, W>::items(a);
}
template <class V, class S, class W>
int64_t attention_bwd_bytes(const Attention& a) {
  return AttentionBwd<V, S, W>::bytes(a);
}
template <class V, class S, class W>
void attention_bwd(const Attention& a, int64_t item, void* workspace) {
  AttentionBwd<V, S, W>::run(a, item, workspace);
}

// dq of rows [begin, end) of [B, H, T] as the sum of the partial sums of its key ranges, in their order.
template <class V, class S>
void attention_bwd_sum_dq(const Attention& a, int64_t begin, int64_t end) {
  using T = typename V::T;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t t = r % a.T, h = r / a.T % a.H, b = r / a.T / a.H;
    const T* partial = (const T*)a.dq_partial + ((b * a.H + h) * a.chunks * a.T + t) * a.D;
    S* to = (S*)a.dq.data + b * a.dq.b + h * a.dq.h + t * a.dq.t;
    for (int64_t d = 0; d < a.D; ++d) {
      T sum = 0;
      for (int64_t c = 0; c < a.chunks; ++c) sum += partial[c * a.T * a.D + d];
      narrow(sum, to[d * a.dq.d]);
    }
  }
}

constexpr AttentionBwdKernels kTable = {PER_TYPE_AND_WORD(attention_bwd_items), PER_TYPE_AND_WORD(attention_bwd_bytes),
                                        PER_TYPE_AND_WORD(attention_bwd), PER_TYPE(attention_bwd_sum_dq)};
