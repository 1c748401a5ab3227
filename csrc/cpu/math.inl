// Functions of a Vec, written once for every width.

// e^(a b + c - low), as if a b + c were not rounded: |low| is far below 1. Below log(2^-126) the result is exactly 0;
// NaN stays.
inline Vec exp_fma(Vec a, Vec b, Vec c, Vec low) {
  // e^x = 2^n e^r with n = round(x / ln 2): adding 1.5 * 2^23 rounds in the adder and leaves n in the low bits of the
  // sum. n ln2_high is exact, so that r has no more than the rounding of c - n ln2_high, which is as large as a b. The
  // polynomial (degree 6 on [-0.347, 0.347], 5e-9) is exact at 0.
  const Vec magic = Vec::set(12582912.0f), log2e = Vec::set(1.44269504f);
  const Vec ln2_high = Vec::set(0.693359375f), ln2_low = Vec::set(-2.12194440e-4f);
  const Vec x = fma(a, b, c), shifted = fma(x, log2e, magic), minus_n = magic - shifted;
  const Vec r = fma(minus_n, ln2_low, fma(a, b, fma(minus_n, ln2_high, c))) - low;
  Vec p = Vec::set(1.381443348e-03f);
  p = fma(p, r, Vec::set(8.368796669e-03f));
  p = fma(p, r, Vec::set(4.166839644e-02f));
  p = fma(p, r, Vec::set(1.666651964e-01f));
  p = fma(p, r, Vec::set(4.999999404e-01f));
  p = fma(p, r, Vec::set(1.0f));
  p = fma(p, r, Vec::set(1.0f));
  return zero_below(x, Vec::set(-87.33654f), scale_by_power_of_two(p, shifted));
}
inline VecD exp_fma(VecD a, VecD b, VecD c, VecD low) { return exp(fma(a, b, c) - low); }
inline Vec exp(Vec x) { return exp_fma(x, Vec::set(1.0f), Vec::set(0.0f), Vec::set(0.0f)); }

// e^x for sums of which the largest term is 1: at least 2^-126, which is as good as 0 there, and without the digits of
// x log2(e) that only a small term would need.
inline Vec exp_normal(Vec x) {
  // e^x = 2^n 2^r with n = round(x log2(e)): adding 1.5 * 2^23 rounds in the adder and leaves n in the low bits of the
  // sum. The polynomial (degree 6 on [-0.5, 0.5], 9e-9) is exact at 0. max keeps a NaN that is its second argument.
  const Vec lowest = Vec::set(-87.33654f), magic = Vec::set(12582912.0f), log2e = Vec::set(1.44269504f);
  const Vec clamped = max(lowest, x);
  const Vec shifted = fma(clamped, log2e, magic), n = shifted - magic;
  const Vec r = fma(clamped, log2e, Vec::set(0.0f) - n);
  Vec p = Vec::set(1.545316336e-04f);
  p = fma(p, r, Vec::set(1.339086331e-03f));
  p = fma(p, r, Vec::set(9.618083015e-03f));
  p = fma(p, r, Vec::set(5.550356954e-02f));
  p = fma(p, r, Vec::set(2.402265072e-01f));
  p = fma(p, r, Vec::set(6.931471825e-01f));
  p = fma(p, r, Vec::set(1.0f));
  return scale_by_power_of_two(p, shifted);
}
inline VecD exp_normal(VecD x) { return exp(x); }

// x within [-bound, bound]; a NaN stays one.
template <class V>
inline V within(V x, typename V::T bound) {
  const V zero = V::set(0), low = V::set(-bound);
  return max(low, zero - max(low, zero - x));
}

inline Vec tanh(Vec x) {
  // Near 0 an odd polynomial (Cephes, 2 ulp below 0.625); elsewhere 1 - 2 / (e^2|x| + 1), which would cancel there.
  const Vec zero = Vec::set(0.0f), one = Vec::set(1.0f), y = max(zero - x, x), z = x * x;
  Vec p = Vec::set(-5.70498872745e-3f);
  p = fma(p, z, Vec::set(2.06390887954e-2f));
  p = fma(p, z, Vec::set(-5.37397155531e-2f));
  p = fma(p, z, Vec::set(1.33314422036e-1f));
  p = fma(p, z, Vec::set(-3.33332819422e-1f));
  const Vec limit = Vec::set(20.0f), bounded = select_lt(limit, y, limit, y);  // e^2y must not overflow; NaN stays
  const Vec near = fma(p * z, x, x), far = one - Vec::set(2.0f) / (exp(bounded + bounded) + one);
  return select_lt(y, Vec::set(0.625f), near, select_lt(x, zero, zero - far, far));
}

// The upper tail of the normal distribution over e^(-a^2/2), for a >= 0: erfc(a / sqrt(2)) / 2 = e^(-a^2/2) * this. A
// polynomial (1.8e-8) in t = 1 / (1 + 0.2625 a); the error function itself would cancel against 1 where a is large.
inline Vec normal_tail_over_exp(Vec a) {
  const Vec one = Vec::set(1.0f), t = one / fma(a, Vec::set(0.2625f), one);
  Vec p = Vec::set(0.030745646f);
  p = fma(p, t, Vec::set(-0.148811087f));
  p = fma(p, t, Vec::set(0.234762862f));
  p = fma(p, t, Vec::set(-0.133393079f));
  p = fma(p, t, Vec::set(0.149139374f));
  p = fma(p, t, Vec::set(0.0558488742f));
  p = fma(p, t, Vec::set(0.102818646f));
  p = fma(p, t, Vec::set(0.104138881f));
  p = fma(p, t, Vec::set(0.104749881f));
  return p * t;
}

// f(i, n) for every vector of a row of D: n lanes of it are inside.
template <class V, class F>
inline void for_vectors(int64_t D, F f) {
  int64_t i = 0;
  for (; i + V::L <= D; i += V::L) f(i, V::L);
  if (i < D) f(i, D - i);
}

// A full vector or the first n lanes of one; the comparison folds away in the main loop of for_vectors.
template <class V, class S>
inline V load(const S* p, int64_t n) {
  return n == V::L ? V::load(p) : V::load(p, n);
}
template <class V, class S>
inline void store(V x, S* p, int64_t n) {
  n == V::L ? x.store(p) : x.store(p, n);
}

// A store of an output, past the caches where `stream` says so; then n is always V::L.
template <class V, class S>
inline void store_output(bool stream, V x, S* p, int64_t n) {
  stream ? x.stream(p) : store(x, p, n);
}

// The lanes of a vector that lie inside a row, zero elsewhere.
template <class V>
inline V inside(V x, int64_t n) {
  return n == V::L ? x : select_lt(V::iota(), V::set(typename V::T(n)), x, V::set(0));
}

// kSums sums over a row: f(s, i, n) adds the terms at [i, i + n) to s[0], s[1], ... Four independent chains: faster,
// and rounding errors grow four times slower.
template <class V, int kSums, class F>
inline void sums_over(int64_t D, typename V::T* totals, F f) {
  V s[4][kSums];
  UNROLLED for (int u = 0; u < 4; ++u) UNROLLED for (int k = 0; k < kSums; ++k) s[u][k] = V::set(0);
  int64_t i = 0;
  for (; i + 4 * V::L <= D; i += 4 * V::L) UNROLLED for (int u = 0; u < 4; ++u) f(s[u], i + u * V::L, int64_t(V::L));
  for (; i + V::L <= D; i += V::L) f(s[0], i, int64_t(V::L));
  if (i < D) f(s[1], i, D - i);
  UNROLLED for (int k = 0; k < kSums; ++k) totals[k] = sum((s[0][k] + s[1][k]) + (s[2][k] + s[3][k]));
}
// One sum: f(s, i, n) is s with the terms at [i, i + n).
template <class V, class F>
inline typename V::T sum_over(int64_t D, F f) {
  typename V::T total;
  sums_over<V, 1>(D, &total, [&](V* s, int64_t i, int64_t n) { *s = f(*s, i, n); });
  return total;
}

// The largest of f(i, n) over a row. A NaN may be lost: sums over the same row keep it.
template <class V, class F>
inline typename V::T max_over(int64_t D, F f) {
  const V lowest = V::set(-INFINITY);
  V m[4] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + 4 * V::L <= D; i += 4 * V::L)
    UNROLLED for (int u = 0; u < 4; ++u) m[u] = max(m[u], f(i + u * V::L, int64_t(V::L)));
  for (; i + V::L <= D; i += V::L) m[0] = max(m[0], f(i, int64_t(V::L)));
  if (i < D) m[1] = max(m[1], select_lt(V::iota(), V::set(typename V::T(D - i)), f(i, D - i), lowest));
  return max_of(max(max(m[0], m[1]), max(m[2], m[3])));
}
