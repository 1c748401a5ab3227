// What attention's forward and backward share: blocks of queries, packing, and (attention_scores.inl) the scores.
//
// Everything is "vector over queries": scores s[k][q], probabilities p[k][q] and outputs o[d][q] are stored transposed,
// so that keys and values are only broadcast from where they lie, and the softmax over keys is vertical: no shuffles,
// no horizontal sums. Only queries are transposed on the way in and outputs on the way out.
//
// A kernel has a vector type V, a storage type S of the tensors, and a word type W of the matrix products (tile.inl).

#include "tile.inl"
#include "attention_scores.inl"

// Whether query t sees some keys, but few: its delta is then not taken from o (attention_bwd.inl).
inline bool sees_few(const Attention& a, int64_t b, int64_t h, int64_t t) {
  constexpr int64_t kFewKeys = 16;
  const Range range = visible_keys(a, t, 1);
  if (!a.mask.data) return range.begin < range.end && range.end - range.begin <= kFewKeys;
  const uint8_t* mask = (const uint8_t*)a.mask.data + b * a.mask.b + h * a.mask.h + t * a.mask.t;
  int64_t seen = 0;
  for (int64_t k = range.begin; k < range.end && seen <= kFewKeys; ++k) seen += mask[k * a.mask.s] != 0;
  return seen > 0 && seen <= kFewKeys;
}

// What a range of keys and some queries add to the gradient of head h's sink. The sink's probability is exp(sink -
// lse), and its value is zero: d(score) = p * (dlse - sum over keys of p * dp), summed over queries into one number.
// `pdp(t)` is that sum over the range, in double, of the very p and dp: taken from o, the rounding of o would be its
// largest error. dlse counts once, with the first range.
template <class T, class Lse, class Sum>
inline double sink_gradient(const Attention& a, int64_t b, int64_t h, int64_t range, Range queries, Lse lse, Sum pdp) {
  const double sink = ((const T*)a.sink)[h];
  const int64_t at = b * a.lse_b + h * a.lse_h;
  double total = 0;
  for (int64_t t = queries.begin; t < queries.end; ++t)
    if (a.lse[at + t] != -INFINITY)
      total += ::exp(sink - lse(t)) * ((a.dlse && range == 0 ? a.dlse[at + t] : 0) - pdp(t));
  return total;
}

template <class V, class S, class W>
struct AttentionBlocks {
  using T = typename V::T;
  using X = Words<V, W>;
  static constexpr int kPer = X::kPer;  // numbers along the summed dimension in a word
  static constexpr int64_t kQueries = ScoreTile<V>::kQueries, kVectors = kQueries / V::L;  // a block of queries
  static constexpr int64_t kRow = ScoreTile<V>::kRow;
  // A panel is what a product takes at once: its scores, probabilities and sums stay in L1 from one to the next.
  static constexpr int64_t kPanel = Tiles::kColumns < kVectors ? Tiles::kColumns : kVectors;
  // On the diagonal each vector of a panel has its own number of keys. Zeros for the last of them in a narrow panel
  // cost less than a product for each vector.
  static constexpr bool kJoined = kPanel <= 2 && kPer == 1;

  static int64_t words(int64_t D) { return (D + kPer - 1) / kPer; }
  static int64_t padded(int64_t D) { return (D + V::L - 1) / V::L * V::L; }
  // A row of D words in a buffer that is read a few words of every row at a time: an odd number of cache lines, as
  // kRow.
  static int64_t spread(int64_t D) {
    return kRow == kQueries ? D : ((D * int64_t(sizeof(W)) + 63) / 64 | 1) * 64 / int64_t(sizeof(W));
  }

  static const S* row(const Heads& x, int64_t b, int64_t h, int64_t t) {
    if (x.pages) b = x.pages[t / x.page_size], t %= x.page_size;
    return (const S*)x.data + b * x.b + h * x.h + t * x.t;
  }

  static V load_row(const S* p, int64_t stride, int64_t n) {
    if (stride == 1) return load<V>(p, n);
    T lanes[V::L] = {};
    for (int64_t i = 0; i < n && i < V::L; ++i) lanes[i] = widen(p[i * stride]);
    return V::load(lanes);
  }

  // dst[i][d] = rows of x, widened to the compute type, zeros from D to the padded width.
  static void pack_rows(const S* x, int64_t row, int64_t step, int64_t n, int64_t D, T* dst) {
    const int64_t width = padded(D);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t d = 0; d < width; d += V::L)
        load_row(x + i * row + d * step, step, D - d < V::L ? D - d : V::L).store(dst + i * width + d);
  }

  // Words along d: a word holds x[i][d] (and x[i][d + 1]). Used where the sum runs over d.
  static void pack_word_rows(const S* x, int64_t row, int64_t step, int64_t n, int64_t D, W* dst, int64_t dst_row) {
    for (int64_t i = 0; i < n; ++i) {
      const S* p = x + i * row;
      W* to = dst + i * dst_row;
      if constexpr (kPer == 1) {
        int64_t d = 0;
        for (; d + V::L <= D; d += V::L) load_row(p + d * step, step, V::L).store(to + d);
        for (; d < D; ++d) to[d] = widen(p[d * step]);
      } else {
        for (int64_t d = 0; d + 1 < D; d += 2) to[d / 2] = pair_of(p[d * step], p[(d + 1) * step]);
        if (D % 2) to[D / 2] = pair_of(p[(D - 1) * step], S{0});
      }
    }
  }

  // Words along rows: a word holds x[i][d] (and x[i + 1][d]), zeros past row n. Used where the sum runs over rows.
  static void pack_row_words(const S* x, int64_t row, int64_t step, int64_t n, int64_t D, W* dst, int64_t dst_row) {
    if constexpr (kPer == 1) {
      pack_word_rows(x, row, step, n, D, dst, dst_row);
    } else {
      for (int64_t i = 0; i < n; i += 2) {
        const S *p = x + i * row, *next = p + row;
        W* to = dst + i / 2 * dst_row;
        if (i + 1 == n)
          for (int64_t d = 0; d < D; ++d) to[d] = pair_of(p[d * step], S{0});
        else if (step == 1)
          for (int64_t d = 0; d < D; ++d) to[d] = pair_of(p[d], next[d]);
        else
          for (int64_t d = 0; d < D; ++d) to[d] = pair_of(p[d * step], next[d * step]);
      }
    }
  }

  // dst[d][q] in rows of kRow: n rows of x as words along d, transposed, zeros past row n in its vector. `scratch`:
  // kQueries rows where a word is two numbers.
  static void pack_transposed(const S* x, int64_t row, int64_t step, int64_t n, int64_t D, W* dst, W* scratch) {
    const int64_t width = words(D);
    if constexpr (kPer == 2) pack_word_rows(x, row, step, n, D, scratch, width);
    for (int64_t q = 0; q < n; q += V::L)
      for (int64_t d = 0; d < width; d += V::L) {
        const int64_t m = width - d < V::L ? width - d : V::L;
        V r[V::L];
        if (kPer == 1 && q + V::L <= n && m == V::L &&
            step == 1) {  // rows so far apart are no stream: ahead, all at once
          const S* p = x + q * row + d;
          UNROLLED for (int64_t i = 0; i < V::L; ++i) {
            if (q + 2 * V::L <= n) PREFETCH(p + (V::L + i) * row);
            r[i] = V::load(p + i * row);
          }
        } else {
          for (int64_t i = 0; i < V::L; ++i) {
            if (q + i >= n)
              r[i] = V::set(0);
            else if constexpr (kPer == 1)
              r[i] = load_row(x + (q + i) * row + d * step, step, m);
            else
              r[i] = load<V>((const T*)(scratch + (q + i) * width + d), m);
          }
        }
        transpose(r);
        for (int64_t i = 0; i < m; ++i) r[i].store((T*)(dst + (d + i) * kRow + q));
      }
  }

  // c[k][q] = sum over d. A long chain of additions has larger errors than the few sums that PyTorch's product of a
  // matrix and a vector adds up; where queries or keys are few, and time is not spent here, it is cut.
  static void product_along_d(const Attention& a, int64_t rows, int64_t vectors, Broadcast<W> left, const W* right,
                              int64_t words, T* c) {
    constexpr int64_t kFew = 16, kPiece = 16;
    const int64_t n = a.T <= kFew || a.S <= kFew ? clamp(words, 0, kPiece) : words;
    product<Start::kZero, V>(rows, vectors, left, right, kRow, n, c, kRow);
    for (int64_t d = n; d < words; d += n)
      product<Start::kAdd, V>(rows, vectors, left.at(0, d), right + d * kRow, kRow, clamp(words - d, 0, n), c, kRow);
  }

  // x rows [0, n) of D = transposed src[d][q] * factor[q].
  static void unpack_transposed(const T* src, const T* factor, int64_t n, int64_t D, S* x, int64_t row, int64_t step) {
    for (int64_t q = 0; q < n; q += V::L)
      for (int64_t d = 0; d < D; d += V::L) {
        const V f = V::load(factor + q);
        V r[V::L];
        for (int64_t i = 0; i < V::L; ++i) r[i] = d + i < D ? V::load(src + (d + i) * kRow + q) * f : V::set(0);
        transpose(r);
        const int64_t rows = n - q < V::L ? n - q : V::L, columns = D - d < V::L ? D - d : V::L;
        for (int64_t i = 0; i < rows; ++i) {
          S* to = x + (q + i) * row + d * step;
          if (step == 1) {
            store(r[i], to, columns);
          } else {
            T lanes[V::L];
            r[i].store(lanes);
            for (int64_t j = 0; j < columns; ++j) narrow(lanes[j], to[j * step]);
          }
        }
      }
  }

  // Keys or values as the left operand of a product that sums over d: in place where their memory allows it.
  static Broadcast<W> along_d(const Heads& x, int64_t b, int64_t h, int64_t t, int64_t n, int64_t D, W* buffer) {
    const S* p = row(x, b, h, t);
    if (x.pages) {
      for (int64_t i = 0; i < n; ++i)
        pack_word_rows(row(x, b, h, t + i), 0, x.d, 1, D, buffer + i * words(D), words(D));
      return {buffer, words(D), 1};
    }
    if constexpr (sizeof(W) == sizeof(S)) return {(const W*)p, x.t, x.d};
    if constexpr (kPer == 2)
      if (x.d == 1 && D % 2 == 0 && x.t % 2 == 0) return {(const W*)p, x.t / 2, 1};
    pack_word_rows(p, x.t, x.d, n, D, buffer, words(D));
    return {buffer, words(D), 1};
  }
  // The same for a product that sums over keys: rows of the operand are d. `buffer` has rows of spread(D) words.
  static Broadcast<W> along_keys(const Heads& x, int64_t b, int64_t h, int64_t t, int64_t n, int64_t D, W* buffer) {
    const S* p = row(x, b, h, t);
    const int64_t width = spread(D);
    if (x.pages) {
      for (int64_t i = 0; i < n; i += kPer) {  // the rows of a word may lie in two pages
        const S* first = row(x, b, h, t + i);
        const bool both = kPer == 2 && i + 1 < n;
        pack_row_words(first, both ? row(x, b, h, t + i + 1) - first : 0, x.d, both ? 2 : 1, D,
                       buffer + i / kPer * width, width);
      }
      return {buffer, 1, width};
    }
    if constexpr (sizeof(W) == sizeof(S)) return {(const W*)p, x.d, x.t};
    pack_row_words(p, x.t, x.d, n, D, buffer, width);
    return {buffer, 1, width};
  }
};
