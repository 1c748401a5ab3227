// softmax and log_softmax of rows of x [B, H, T, S]: y = exp(scale * x - max) / sum, over the visible columns.

// One row: where its data are, how many leading columns causality leaves, and where its mask lies.
struct SoftmaxRow {
  int64_t begin, visible;
  const uint8_t* mask;
};
inline SoftmaxRow softmax_row(const Softmax& a, int64_t row) {
  const int64_t t = row % a.T, h = row / a.T % a.H, b = row / a.T / a.H;
  int64_t visible = a.causal ? t + a.S - a.T + 1 : a.S;
  visible = visible < 0 ? 0 : visible > a.S ? a.S : visible;
  const int64_t* stride = a.mask_stride;
  return {row * a.S, visible, a.mask ? a.mask + b * stride[0] + h * stride[1] + t * stride[2] : nullptr};
}

// s[i] = scale * x[i], or -inf where the mask hides, as `keep` leaves it; the largest of them.
template <class V, class S>
typename V::T masked_scores(const Softmax& a, SoftmaxRow row, typename V::T* s) {
  using T = typename V::T;
  const S* x = (const S*)a.x + row.begin;
  const V scale = V::set(T(a.scale)), hidden = V::set(-INFINITY);
  const int64_t stride = a.mask_stride[3];
  V m = hidden;
  for_vectors<V>(row.visible, [&](int64_t i, int64_t n) {
    T shown[V::L];
    for (int64_t j = 0; j < V::L; ++j) shown[j] = j < n && row.mask[(i + j) * stride] ? T(1) : T(0);
    const V v = select_lt(V::set(0), V::load(shown), load<V>(x + i, n) * scale, hidden);
    keep(v, s + i);
    m = max(m, v);
  });
  return max_of(m);
}

// Without a mask the scores need no memory: they are made from x again.
template <class V, class S>
inline typename V::T largest_score(const Softmax& a, SoftmaxRow row) {
  const S* x = (const S*)a.x + row.begin;
  const typename V::T scale = a.scale;
  // Rounding keeps the order: the largest product is that of the largest x.
  if (scale > 0) return scale * max_over<V>(row.visible, [&](int64_t i, int64_t n) { return load<V>(x + i, n); });
  return max_over<V>(row.visible, [&](int64_t i, int64_t n) { return load<V>(x + i, n) * V::set(scale); });
}

template <class V, class S, bool kLog, bool kMasked>
FLATTENED void softmax_row_fwd(const Softmax& a, SoftmaxRow row, typename V::T* s) {
  using T = typename V::T;
  const S *x = (const S*)a.x + row.begin, *next = x + a.S;
  S* y = (S*)a.y + row.begin;
  const T m = kMasked ? masked_scores<V, S>(a, row, s) : largest_score<V, S>(a, row);
  const bool empty = !(m > -INFINITY) && !(m != m), stream = a.stream;
  const V scale = V::set(kMasked ? T(1) : T(a.scale)), shift = V::set(empty ? T(0) : m), zero = V::set(0);
  auto unscaled = [&](int64_t i, int64_t n) {
    V v;
    if (kMasked)
      recall(s + i, v);
    else
      v = load<V>(x + i, n);
    return v;
  };

  // What the next steps wait for is fetched here, where the terms leave the memory idle: the next row and, unless it is
  // stored past the caches, y. One chain of sums is enough for terms as long as these, and leaves registers to them.
  const S* fetched = stream ? next : y;
  const T total = sum_over<V, V::kChains / 2>(row.visible, [&](V sum, int64_t i, int64_t n) {
    PREFETCH(next + i);
    PREFETCH(fetched + i);
    const V e = exp_of_term(fma(unscaled(i, n), scale, zero - shift));
    if (!kLog) keep(e, s + i);
    return sum + inside(e, n);
  });
  if (kLog) {
    const V log_total = V::set(empty ? T(0) : T(log(double(total))));
    for_vectors<V>(row.visible, [&](int64_t i, int64_t n) {
      store_output(stream, (unscaled(i, n) * scale - shift) - log_total, y + i, n);
    });
  } else {
    // The reciprocal in two numbers: a product with both is rounded once, as a division is, and much cheaper.
    const T inverse = empty ? T(0) : T(1) / total, rest = T((1 - double(inverse) * double(total)) * inverse);
    const V high = V::set(inverse), low = V::set(rest);
    for_vectors<V>(row.visible, [&](int64_t i, int64_t n) {
      V e;
      recall(s + i, e);
      store_output(stream, fma(e, high, e * low), y + i, n);
    });
  }
  const V hidden = V::set(kLog ? T(-INFINITY) : T(0));
  for_vectors<V>(a.S - row.visible, [&](int64_t i, int64_t n) { store(hidden, y + row.visible + i, n); });
}

template <class V, class S, bool kLog>
void softmax_rows_fwd(const Softmax& a, int64_t begin, int64_t end, void* workspace) {
  using T = typename V::T;
  for (int64_t r = begin; r < end; ++r) {
    const SoftmaxRow row = softmax_row(a, r);
    row.mask ? softmax_row_fwd<V, S, kLog, true>(a, row, (T*)workspace)
             : softmax_row_fwd<V, S, kLog, false>(a, row, (T*)workspace);
  }
  if (a.stream) STREAM_FENCE();
}
template <class V, class S>
void softmax_fwd(const Softmax& a, int64_t begin, int64_t end, void* workspace) {
  a.log ? softmax_rows_fwd<V, S, true>(a, begin, end, workspace)
        : softmax_rows_fwd<V, S, false>(a, begin, end, workspace);
}

// dx = scale * y * (dy - sum(y * dy)); for the logarithm scale * (dy - exp(y) * sum(dy)), 0 where y is -inf.
template <class V, class S, bool kLog>
FLATTENED void softmax_rows_bwd(const Softmax& a, int64_t begin, int64_t end) {
  using T = typename V::T;
  const int64_t D = a.S;
  const bool stream = a.stream;
  const V scale = V::set(T(a.scale)), zero = V::set(0), lowest = V::set(-INFINITY);
  for (int64_t row = begin; row < end; ++row) {
    const S *y = (const S*)a.y + row * D, *dy = (const S*)a.dy + row * D;
    S* dx = (S*)a.dx + row * D;
    // Where one y is nearly 1, its dy is nearly the total. As the exact y add up to 1, the total is divided by the sum
    // of the rounded ones: that takes away most of what their rounding does to the difference.
    double sums[kLog ? 1 : 2];
    wide_sums_over<V, kLog ? 1 : 2>(D, sums, [&](V* s, int64_t i, int64_t n) {
      const V d = load<V>(dy + i, n);
      if constexpr (kLog) {
        s[0] = s[0] + d;
      } else {
        const V v = load<V>(y + i, n);
        s[0] = fma(v, d, s[0]);
        s[1] = s[1] + v;
      }
    });
    if constexpr (!kLog)
      if (sums[1] != 0) sums[0] /= sums[1];  // it is 0 where everything is hidden
    const V total = V::set(T(sums[0]));
    for_vectors<V>(D, [&](int64_t i, int64_t n) {
      PREFETCH(y + D + i);
      PREFETCH(dy + D + i);
      const V yi = load<V>(y + i, n), di = load<V>(dy + i, n);
      const V d = kLog ? select_lt(lowest, yi, di - exp(yi) * total, zero) : yi * (di - total);
      store_output(stream, d * scale, dx + i, n);
    });
  }
  if (stream) STREAM_FENCE();
}
template <class V, class S>
void softmax_bwd(const Softmax& a, int64_t begin, int64_t end) {
  a.log ? softmax_rows_bwd<V, S, true>(a, begin, end) : softmax_rows_bwd<V, S, false>(a, begin, end);
}

constexpr SoftmaxKernels kTable = {PER_WIDE(softmax_fwd), PER_WIDE(softmax_bwd)};
