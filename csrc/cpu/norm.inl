// layer_norm and rms_norm: y = (h - mean) * rstd * weight + bias with h = dropout(x) + residual.
#include "philox.inl"

// f(i, n, keep) for every vector of a row: keep is 1 / (1 - dropout_p), or 0 with probability dropout_p. The counter is
// (row, column / 4, row / 2^32).
template <class V, class F>
inline void for_kept(const Norm& a, int64_t row, F f) {
  using T = typename V::T;
  constexpr int kGroups = 16;
  const uint32_t threshold = dropout_threshold(a.dropout_p);
  const T kept = T(1 / (1 - a.dropout_p));
  for (int64_t start = 0; start < a.D; start += 4 * kGroups) {
    uint32_t words[4][kGroups];
    for (int i = 0; i < kGroups; ++i) {
      words[0][i] = uint32_t(row), words[1][i] = uint32_t(start / 4 + i);
      words[2][i] = uint32_t(row >> 32), words[3][i] = 0;
    }
    philox<kGroups>(words, a.seed);
    T keep[4 * kGroups];
    for (int i = 0; i < kGroups; ++i)
      for (int j = 0; j < 4; ++j) keep[4 * i + j] = words[j][i] < threshold ? T(0) : kept;
    const int64_t count = a.D - start < 4 * kGroups ? a.D - start : 4 * kGroups;
    for_vectors<V>(count, [&](int64_t i, int64_t n) { f(start + i, n, V::load(keep + i)); });
  }
}

// h of one row: x itself, or the sum with the residual, rounded to the storage type as the next block will see it.
template <class V, class S>
inline const S* residual_sum(const Norm& a, int64_t row) {
  const int64_t D = a.D;
  const S* x = (const S*)a.x + row * D;
  if (!a.h) return x;
  const S* residual = a.residual ? (const S*)a.residual + row * D : nullptr;
  S* h = (S*)a.h + row * D;
  if (a.dropout_p > 0)
    for_kept<V>(a, row, [&](int64_t i, int64_t n, V keep) {
      const V v = load<V>(x + i, n) * keep;
      store(residual ? v + load<V>(residual + i, n) : v, h + i, n);
    });
  else
    for_vectors<V>(D, [&](int64_t i, int64_t n) { store(load<V>(x + i, n) + load<V>(residual + i, n), h + i, n); });
  return h;
}

// Of the weights and sums that a norm may have, a layer_norm has all or an rms_norm its own: then nothing is asked of
// each vector.
template <bool kCentred>
inline bool has_all(const void* weight, const void* bias) {
  return weight && (bias != nullptr) == kCentred;
}

template <class V, class S, bool kCentred, bool kAll>
void norm_rows_fwd(const Norm& a, int64_t begin, int64_t end) {
  using T = typename V::T;
  const int64_t D = a.D;
  const T *weight = (const T*)a.weight, *bias = (const T*)a.bias;
  const bool has_weight = kAll || weight, has_bias = kAll ? kCentred : bias != nullptr;
  const bool stream = a.stream;
  const V offset = V::set(T(a.weight_offset));
  for (int64_t row = begin; row < end; ++row) {
    const S* h = residual_sum<V, S>(a, row);
    S* y = (S*)a.y + row * D;
    T mean = 0, squares;
    if (kCentred) {
      // The memory is idle until y is written: y is fetched, unless it is stored past the caches or, with the rows
      // beside it, would not stay in the first one.
      const S* fetched = stream || D * int64_t(sizeof(S)) > 8192 ? h : y;
      mean = sum_over<V>(D, [&](V s, int64_t i, int64_t n) {
        PREFETCH(fetched + i);
        return s + load<V>(h + i, n);
      });
      mean /= T(D);
      // The variance from centred values: E[h^2] - mean^2 would cancel where the mean is large. The mean is rounded:
      // what is left of it in the centred row corrects both.
      const V rounded = V::set(mean);
      T sums[2];  // of the squares, of what is left
      sums_over<V, 2>(D, sums, [&](V* s, int64_t i, int64_t n) {
        const V d = inside(load<V>(h + i, n) - rounded, n);
        s[0] = fma(d, d, s[0]);
        s[1] = s[1] + d;
      });
      const T correction = sums[1] / T(D);
      squares = sums[0] - correction * correction * T(D);
      if (squares < 0) squares = 0;  // a constant row far from 0, where the two differ by rounding alone
      mean += correction;
    } else {
      squares = sum_over<V>(D, [&](V s, int64_t i, int64_t n) {
        const V x = load<V>(h + i, n);
        return fma(x, x, s);
      });
    }
    const T rstd = T(1) / T(::sqrt(double(squares / T(D)) + a.eps));
    if (a.mean) ((T*)a.mean)[row] = mean;
    if (a.rstd) ((T*)a.rstd)[row] = rstd;

    // While a row is written, what the next one reads is fetched: a row is too short for the CPU to see a stream. What
    // `a` points to is named here, as the compiler would read it anew after every store.
    const S* next = (const S*)a.x + (row + 1) * D;
    const S* next_residual = a.residual ? (const S*)a.residual + (row + 1) * D : nullptr;
    const V mu = V::set(mean), r = V::set(rstd);
    for_vectors<V>(D, [&](int64_t i, int64_t n) {
      PREFETCH(next + i);
      if (next_residual) PREFETCH(next_residual + i);
      const V x = load<V>(h + i, n);
      V v = kCentred ? (x - mu) * r : x * r;
      if (has_weight) v = v * (kCentred ? load<V>(weight + i, n) : load<V>(weight + i, n) + offset);
      if (has_bias) v = v + load<V>(bias + i, n);
      store_output(stream, v, y + i, n);
    });
  }
  if (stream) STREAM_FENCE();
}
template <class V, class S, bool kCentred>
void norm_fwd(const Norm& a, int64_t begin, int64_t end) {
  has_all<kCentred>(a.weight, a.bias) ? norm_rows_fwd<V, S, kCentred, true>(a, begin, end)
                                      : norm_rows_fwd<V, S, kCentred, false>(a, begin, end);
}
template <class V, class S>
void layer_norm_fwd(const Norm& a, int64_t begin, int64_t end) {
  norm_fwd<V, S, true>(a, begin, end);
}
template <class V, class S>
void rms_norm_fwd(const Norm& a, int64_t begin, int64_t end) {
  norm_fwd<V, S, false>(a, begin, end);
}

// Gradients of kRows rows from `row` on: with g = dy * weight and xhat = (h - mean) * rstd,
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dh, without mean(g) for rms_norm
// (this is the residual's gradient; x's has dropout's factor), and the sums dweight += dy * xhat, dbias += dy, which
// may be null. Weights and sums are loaded, and stored, once for all the rows.
template <class V, class S, bool kCentred, int kRows, bool kAll>
void norm_bwd_rows(const Norm& a, int64_t row, typename V::T* dweight, typename V::T* dbias) {
  using T = typename V::T;
  const int64_t D = a.D;
  const T* weight = (const T*)a.weight;
  const bool has_dweight = kAll || dweight, has_dbias = kAll ? kCentred : dbias != nullptr;
  const V offset = V::set(T(a.weight_offset)), zero = V::set(0);
  const S *h = (const S*)a.h + row * D, *dy = (const S*)a.dy + row * D;
  T rstd[kRows];
  V mu[kRows], r[kRows], sum_g[kRows], sum_gx[kRows];
  UNROLLED for (int k = 0; k < kRows; ++k) {
    rstd[k] = ((const T*)a.rstd)[row + k];
    mu[k] = V::set(kCentred ? ((const T*)a.mean)[row + k] : T(0)), r[k] = V::set(rstd[k]);
    sum_g[k] = sum_gx[k] = zero;
  }
  auto weights = [&](int64_t i, int64_t n) INLINED {
    return weight ? kCentred ? load<V>(weight + i, n) : load<V>(weight + i, n) + offset : zero;
  };
  for_vectors<V>(D, [&](int64_t i, int64_t n) INLINED {
    const V w = weights(i, n);
    V dw = has_dweight ? load<V>(dweight + i, n) : zero, db = has_dbias ? load<V>(dbias + i, n) : zero;
    UNROLLED for (int k = 0; k < kRows; ++k) {
      const V d = load<V>(dy + k * D + i, n), v = load<V>(h + k * D + i, n), x = (kCentred ? v - mu[k] : v) * r[k];
      const V g = weight ? d * w : d;
      if (kCentred) sum_g[k] = sum_g[k] + g;
      sum_gx[k] = fma(g, x, sum_gx[k]);
      dw = fma(d, x, dw);
      db = db + d;
    }
    if (has_dweight) store(dw, dweight + i, n);
    if (has_dbias) store(db, dbias + i, n);
  });

  // dx = (g - mean(g) - (h - mean) * rstd * mean(g * xhat)) * rstd: differences first, which are exactly 0 in rows
  // of 1.
  V slope[kRows], mean_g[kRows];
  UNROLLED for (int k = 0; k < kRows; ++k) {
    slope[k] = V::set(-rstd[k] * (sum(sum_gx[k]) / T(D)));
    mean_g[k] = V::set(kCentred ? sum(sum_g[k]) / T(D) : T(0));
  }
  S *dx = (S*)a.dx + row * D, *dresidual = (S*)a.dresidual + (a.dresidual ? row * D : 0);
  const S* dh = a.dh ? (const S*)a.dh + row * D : nullptr;
  auto gradient = [&](int k, V w, int64_t i, int64_t n) INLINED {
    const int64_t at = k * D + i;
    PREFETCH(h + kRows * D + at);
    PREFETCH(dy + kRows * D + at);
    const V d_at = load<V>(dy + at, n), g = weight ? rounded(d_at * w) : d_at, v = load<V>(h + at, n);
    const V d = (kCentred ? fma(v - mu[k], slope[k], g - mean_g[k]) : fma(v, slope[k], g)) * r[k];
    return dh ? d + load<V>(dh + at, n) : d;
  };
  const bool stream = a.stream;
  if (!kAll && a.dropout_p > 0)
    for (int k = 0; k < kRows; ++k)
      for_kept<V>(a, row + k, [&](int64_t i, int64_t n, V keep) {
        const V d = gradient(k, weights(i, n), i, n);
        if (dresidual) store(d, dresidual + k * D + i, n);
        store(d * keep, dx + k * D + i, n);
      });
  else
    for_vectors<V>(D, [&](int64_t i, int64_t n) INLINED {
      const V w = weights(i, n);
      UNROLLED for (int k = 0; k < kRows; ++k) store_output(stream, gradient(k, w, i, n), dx + k * D + i, n);
    });
}

// Rows [begin, end), the sums of which are the partial sums of this stripe of rows.
template <class V, class S, bool kCentred, bool kAll>
void norm_stripe_bwd(const Norm& a, int64_t stripe, int64_t begin, int64_t end) {
  using T = typename V::T;
  constexpr int kRows = 2;
  T* dweight = a.dweight ? (T*)a.dweight + stripe * a.D : nullptr;
  T* dbias = a.dbias ? (T*)a.dbias + stripe * a.D : nullptr;
  if (dweight) memset(dweight, 0, a.D * sizeof(T));
  if (dbias) memset(dbias, 0, a.D * sizeof(T));
  int64_t row = begin;
  // What goes past the caches is gathered line by line, and halves of lines of two rows by turns are not.
  for (; row + kRows <= end && !a.stream; row += kRows)
    norm_bwd_rows<V, S, kCentred, kRows, kAll>(a, row, dweight, dbias);
  for (; row < end; ++row) norm_bwd_rows<V, S, kCentred, 1, kAll>(a, row, dweight, dbias);
  if (a.stream) STREAM_FENCE();
}
template <class V, class S, bool kCentred>
void norm_bwd(const Norm& a, int64_t stripe, int64_t begin, int64_t end) {
  has_all<kCentred>(a.dweight, a.dbias) && a.weight&& a.dropout_p == 0
      ? norm_stripe_bwd<V, S, kCentred, true>(a, stripe, begin, end)
      : norm_stripe_bwd<V, S, kCentred, false>(a, stripe, begin, end);
}
template <class V, class S>
void layer_norm_bwd(const Norm& a, int64_t stripe, int64_t begin, int64_t end) {
  norm_bwd<V, S, true>(a, stripe, begin, end);
}
template <class V, class S>
void rms_norm_bwd(const Norm& a, int64_t stripe, int64_t begin, int64_t end) {
  norm_bwd<V, S, false>(a, stripe, begin, end);
}

constexpr NormKernels kTable = {PER_WIDE(layer_norm_fwd), PER_TYPE(layer_norm_bwd), PER_WIDE(rms_norm_fwd),
                                PER_TYPE(rms_norm_bwd)};
