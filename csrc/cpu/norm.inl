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
  const S* x = (const S*)a.x + row * a.D;
  if (!a.h) return x;
  const S* residual = (const S*)a.residual + (a.residual ? row * a.D : 0);
  S* h = (S*)a.h + row * a.D;
  if (a.dropout_p > 0)
    for_kept<V>(a, row, [&](int64_t i, int64_t n, V keep) {
      const V v = load<V>(x + i, n) * keep;
      store(a.residual ? v + load<V>(residual + i, n) : v, h + i, n);
    });
  else
    for_vectors<V>(a.D, [&](int64_t i, int64_t n) { store(load<V>(x + i, n) + load<V>(residual + i, n), h + i, n); });
  return h;
}

// While a row is written, what the next one reads is fetched: a row is too short for the CPU to see a stream.
template <class S>
inline void prefetch_next_row(const Norm& a, int64_t row, int64_t i) {
  PREFETCH((const S*)a.x + (row + 1) * a.D + i);
  if (a.residual) PREFETCH((const S*)a.residual + (row + 1) * a.D + i);
}

template <class V, class S>
void layer_norm_fwd(const Norm& a, int64_t begin, int64_t end) {
  using T = typename V::T;
  const int64_t D = a.D;
  const T *weight = (const T*)a.weight, *bias = (const T*)a.bias;
  for (int64_t row = begin; row < end; ++row) {
    const S* h = residual_sum<V, S>(a, row);
    T mean = sum_over<V>(D, [&](V s, int64_t i, int64_t n) { return s + load<V>(h + i, n); }) / T(D);

    // The variance from centred values: E[h^2] - mean^2 would cancel where the mean is large. The mean is rounded: what
    // is left of it in the centred row corrects both.
    const V rounded = V::set(mean);
    V left[2] = {V::set(0), V::set(0)};
    int turn = 0;
    T squares = sum_over<V>(D, [&](V s, int64_t i, int64_t n) {
      const V d = inside(load<V>(h + i, n) - rounded, n);
      left[turn] = left[turn] + d;
      turn ^= 1;
      return fma(d, d, s);
    });
    const T correction = sum(left[0] + left[1]) / T(D);
    squares -= correction * correction * T(D);
    if (squares < 0) squares = 0;  // a constant row far from 0, where the two differ by rounding alone
    mean += correction;
    const V mu = V::set(mean);
    const T rstd = T(1) / T(::sqrt(double(squares / T(D)) + a.eps));
    if (a.mean) ((T*)a.mean)[row] = mean;
    if (a.rstd) ((T*)a.rstd)[row] = rstd;

    S* y = (S*)a.y + row * D;
    const V r = V::set(rstd);
    for_vectors<V>(D, [&](int64_t i, int64_t n) {
      prefetch_next_row<S>(a, row, i);
      V v = (load<V>(h + i, n) - mu) * r;
      if (weight) v = v * load<V>(weight + i, n);
      if (bias) v = v + load<V>(bias + i, n);
      store_output(a.stream, v, y + i, n);
    });
  }
  if (a.stream) STREAM_FENCE();
}

template <class V, class S>
void rms_norm_fwd(const Norm& a, int64_t begin, int64_t end) {
  using T = typename V::T;
  const int64_t D = a.D;
  const T* weight = (const T*)a.weight;
  const V offset = V::set(T(a.weight_offset));
  for (int64_t row = begin; row < end; ++row) {
    const S* h = residual_sum<V, S>(a, row);
    const T squares = sum_over<V>(D, [&](V s, int64_t i, int64_t n) {
      const V x = load<V>(h + i, n);
      return fma(x, x, s);
    });
    const T rstd = T(1) / T(::sqrt(double(squares / T(D)) + a.eps));
    if (a.rstd) ((T*)a.rstd)[row] = rstd;

    S* y = (S*)a.y + row * D;
    const V r = V::set(rstd);
    for_vectors<V>(D, [&](int64_t i, int64_t n) {
      prefetch_next_row<S>(a, row, i);
      V v = load<V>(h + i, n) * r;
      if (weight) v = v * (load<V>(weight + i, n) + offset);
      store_output(a.stream, v, y + i, n);
    });
  }
  if (a.stream) STREAM_FENCE();
}

// Gradients of rows [begin, end): with g = dy * weight and xhat = (h - mean) * rstd,
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dh, without mean(g) for rms_norm (this is the residual's
//   gradient;
// x's has dropout's factor),
// and the sums dweight += dy * xhat, dbias += dy into the partial sums of this stripe of rows.
template <class V, class S, bool kCentred>
void norm_bwd(const Norm& a, int64_t stripe, int64_t begin, int64_t end) {
  using T = typename V::T;
  const int64_t D = a.D;
  const T* weight = (const T*)a.weight;
  const V offset = V::set(T(a.weight_offset));
  T* dweight = a.dweight ? (T*)a.dweight + stripe * D : nullptr;
  T* dbias = a.dbias ? (T*)a.dbias + stripe * D : nullptr;
  if (dweight) memset(dweight, 0, D * sizeof(T));
  if (dbias) memset(dbias, 0, D * sizeof(T));

  for (int64_t row = begin; row < end; ++row) {
    const S *h = (const S*)a.h + row * D, *dy = (const S*)a.dy + row * D;
    const V mu = V::set(kCentred ? ((const T*)a.mean)[row] : T(0)), r = V::set(((const T*)a.rstd)[row]);
    auto g = [&](int64_t i, int64_t n) {
      const V d = load<V>(dy + i, n);
      return weight ? d * (load<V>(weight + i, n) + offset) : d;
    };
    V sum_g = V::set(0), sum_gx[2] = {V::set(0), V::set(0)};
    int turn = 0;
    for_vectors<V>(D, [&](int64_t i, int64_t n) {
      const V d = load<V>(dy + i, n), x = (load<V>(h + i, n) - mu) * r, gi = g(i, n);
      if (kCentred) sum_g = sum_g + gi;
      sum_gx[turn] = fma(gi, x, sum_gx[turn]);
      turn ^= 1;
      if (dweight) store(fma(d, x, load<V>(dweight + i, n)), dweight + i, n);
      if (dbias) store(d + load<V>(dbias + i, n), dbias + i, n);
    });
    const V mean_g = V::set(sum(sum_g) / T(D)), mean_gx = V::set(sum(sum_gx[0] + sum_gx[1]) / T(D));

    S *dx = (S*)a.dx + row * D, *dresidual = (S*)a.dresidual + (a.dresidual ? row * D : 0);
    const S* dh_row = (const S*)a.dh + (a.dh ? row * D : 0);
    auto gradient = [&](int64_t i, int64_t n) {
      PREFETCH(h + D + i);
      PREFETCH(dy + D + i);
      const V x = (load<V>(h + i, n) - mu) * r;
      V d = g(i, n) - x * mean_gx;
      if (kCentred) d = d - mean_g;
      d = d * r;
      return a.dh ? d + load<V>(dh_row + i, n) : d;
    };
    if (a.dropout_p > 0)
      for_kept<V>(a, row, [&](int64_t i, int64_t n, V keep) {
        const V d = gradient(i, n);
        if (a.dresidual) store(d, dresidual + i, n);
        store(d * keep, dx + i, n);
      });
    else
      for_vectors<V>(D, [&](int64_t i, int64_t n) { store_output(a.stream, gradient(i, n), dx + i, n); });
  }
  if (a.stream) STREAM_FENCE();
}
template <class V, class S>
void layer_norm_bwd(const Norm& a, int64_t stripe, int64_t begin, int64_t end) {
  norm_bwd<V, S, true>(a, stripe, begin, end);
}
template <class V, class S>
void rms_norm_bwd(const Norm& a, int64_t stripe, int64_t begin, int64_t end) {
  norm_bwd<V, S, false>(a, stripe, begin, end);
}

constexpr NormKernels kTable = {PER_TYPE(layer_norm_fwd), PER_TYPE(layer_norm_bwd), PER_TYPE(rms_norm_fwd),
                                PER_TYPE(rms_norm_bwd)};
