// Functions of a Vec, written once for every width.

// A function of a vector of floats is a template on it, so that one of Two vectors has it too. VecD, whose numbers are
// double, has its own.

// e^r for r in [-0.347, 0.347].
template <class V>
inline V exp_polynomial(V r) {
  // Degree 6 (5e-9), exact at 0.
  V p = V::set(1.381443348e-03f);
  p = fma(p, r, V::set(8.368796669e-03f));
  p = fma(p, r, V::set(4.166839644e-02f));
  p = fma(p, r, V::set(1.666651964e-01f));
  p = fma(p, r, V::set(4.999999404e-01f));
  p = fma(p, r, V::set(1.0f));
  return fma(p, r, V::set(1.0f));
}
// The same times 2^n, which is in the low bits of `shifted`.
template <class V>
inline V exp_reduced(V r, V shifted) {
  return scale_by_power_of_two(exp_polynomial(r), shifted);
}

// e^(a b + c - low), as if a b + c were not rounded: |low| is far below 1, and a b + c within [-87, 87].
template <class V>
inline V exp_fma_bounded(V a, V b, V c, V low) {
  // e^x = 2^n e^r with n = round(x / ln 2): adding 1.5 * 2^23 rounds in the adder and leaves n in the low bits of the
  // sum. n ln2_high is exact, so that r has no more than the rounding of c - n ln2_high, which is as large as a b.
  const V magic = V::set(12582912.0f), log2e = V::set(1.44269504f);
  const V ln2_high = V::set(0.693359375f), ln2_low = V::set(-2.12194440e-4f);
  const V shifted = fma(fma(a, b, c), log2e, magic), minus_n = magic - shifted;
  return exp_reduced(fma(minus_n, ln2_low, fma(a, b, fma(minus_n, ln2_high, c))) - low, shifted);
}
inline VecD exp_fma_bounded(VecD a, VecD b, VecD c, VecD low) { return exp(fma(a, b, c) - low); }

// The same of any a b + c up to 87: below log(2^-126) the result is exactly 0; NaN stays.
template <class V>
inline V exp_fma(V a, V b, V c, V low) {
  return zero_below(fma(a, b, c), V::set(-87.33654f), exp_fma_bounded(a, b, c, low));
}
inline VecD exp_fma(VecD a, VecD b, VecD c, VecD low) { return exp_fma_bounded(a, b, c, low); }
template <class V>
inline V exp(V x) {
  const V magic = V::set(12582912.0f), shifted = fma(x, V::set(1.44269504f), magic), minus_n = magic - shifted;
  const V r = fma(minus_n, V::set(-2.12194440e-4f), fma(minus_n, V::set(0.693359375f), x));
  return zero_below(x, V::set(-87.33654f), exp_reduced(r, shifted));
}

// e^x for the terms of a row's sum, the largest of which is 1: exactly 0 below log(2^-126.5), as n is then -127 and
// 2^n, which a product applies, has the bits of 0. ln 2 is one number, 2.7e-9 of it off. max keeps a NaN that is its
// second argument.
template <class V>
inline V exp_of_term(V x) {
  const V bounded = max(V::set(-88.1f), x), magic_and_bias = V::set(12582912.0f + 127);
  const V shifted = fma(bounded, V::set(1.44269504f), magic_and_bias);
  const V r = fma(magic_and_bias - shifted, V::set(0.693147182f), bounded);
  return exp_polynomial(r) * scale_by_power_of_two(V::set(0), shifted);
}
inline VecD exp_of_term(VecD x) { return exp(x); }

// 2^(x factor) for x factor within [-126, 127], without the digits of the product that only a result far from 1 needs.
template <class V>
inline V power_of_two(V x, V factor) {
  // 2^y = 2^n 2^r with n = round(y): adding 1.5 * 2^23 rounds in the adder and leaves n in the low bits of the sum. The
  // polynomial (degree 6 on [-0.5, 0.5], 9e-9) is exact at 0.
  const V magic = V::set(12582912.0f), shifted = fma(x, factor, magic), r = fma(x, factor, magic - shifted);
  V p = V::set(1.545316336e-04f);
  p = fma(p, r, V::set(1.339086331e-03f));
  p = fma(p, r, V::set(9.618083015e-03f));
  p = fma(p, r, V::set(5.550356954e-02f));
  p = fma(p, r, V::set(2.402265072e-01f));
  p = fma(p, r, V::set(6.931471825e-01f));
  p = fma(p, r, V::set(1.0f));
  return scale_by_power_of_two(p, shifted);
}

// e^x for sums of which the largest term is 1: at least 2^-126, which is as good as 0 there. max keeps a NaN that is
// its second argument.
template <class V>
inline V exp_normal(V x) {
  return power_of_two(max(V::set(-87.33654f), x), V::set(1.44269504f));
}
inline VecD exp_normal(VecD x) { return exp(x); }

// e^-x for x within [-87, 87].
template <class V>
inline V exp_minus(V x) {
  return power_of_two(x, V::set(-1.44269504f));
}
inline VecD exp_minus(VecD x) { return exp(VecD::set(0) - x); }

// x within [-bound, bound]; a NaN stays one.
template <class V>
inline V within(V x, typename V::T bound) {
  return max(V::set(-bound), min(V::set(bound), x));
}

template <class V>
inline V tanh(V x) {
  // Near 0 an odd polynomial (Cephes, 2 ulp below 0.625); elsewhere 1 - 2 / (e^2|x| + 1), which would cancel there.
  const V zero = V::set(0.0f), one = V::set(1.0f), y = max(zero - x, x), z = x * x;
  V p = V::set(-5.70498872745e-3f);
  p = fma(p, z, V::set(2.06390887954e-2f));
  p = fma(p, z, V::set(-5.37397155531e-2f));
  p = fma(p, z, V::set(1.33314422036e-1f));
  p = fma(p, z, V::set(-3.33332819422e-1f));
  const V two = V::set(2.0f), bounded = min(V::set(20.0f), y);  // e^2y must not overflow; NaN stays
  const V near = fma(p * z, x, x), far = one - two / (exp_fma_bounded(bounded, two, zero, zero) + one);
  return select_lt(y, V::set(0.625f), near, select_lt(x, zero, zero - far, far));
}

// The upper tail of the normal distribution over e^(-a^2/2), for a >= 0: erfc(a / sqrt(2)) / 2 = e^(-a^2/2) * this. A
// polynomial (1.8e-8) in t = 1 / (1 + 0.2625 a); the error function itself would cancel against 1 where a is large.
template <class V>
inline V normal_tail_over_exp(V a) {
  const V one = V::set(1.0f), t = one / fma(a, V::set(0.2625f), one);
  V p = V::set(0.030745646f);
  p = fma(p, t, V::set(-0.148811087f));
  p = fma(p, t, V::set(0.234762862f));
  p = fma(p, t, V::set(-0.133393079f));
  p = fma(p, t, V::set(0.149139374f));
  p = fma(p, t, V::set(0.0558488742f));
  p = fma(p, t, V::set(0.102818646f));
  p = fma(p, t, V::set(0.104138881f));
  p = fma(p, t, V::set(0.104749881f));
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

// A store of an output, past the caches where `stream` says so and the vector is whole.
template <class V, class S>
inline void store_output(bool stream, V x, S* p, int64_t n) {
  stream&& n == V::L ? x.stream(p) : store(x, p, n);
}

// The numbers of a vector that lie inside a row, others elsewhere.
template <class V>
inline V inside(V x, int64_t n, V outside) {
  return n == V::L ? x : select_lt(V::iota(), V::set(typename V::T(n)), x, outside);
}
template <class V>
inline V inside(V x, int64_t n) {
  return inside(x, n, V::set(0));
}

// For a while to memory that nobody else reads, in whatever order is cheapest: a whole vector.
template <class V>
inline void keep(V x, typename V::T* p) {
  x.store(p);
}
template <class V>
inline void recall(const typename V::T* p, V& x) {
  x = V::load(p);
}

// A product that a difference may have to cancel exactly: the compiler must not make one FMA of both.
template <class V>
inline V rounded(V x) {
  return x;
}

// The sum of the vectors that Two are; a vector alone is itself.
template <class V>
inline V joined(V x) {
  return x;
}

#include "vec_two.inl"

// kSums sums over a row: f(s, i, n) adds the terms at [i, i + n) to s[0], s[1], ... in C independent chains (four of
// single vectors): faster, and rounding errors grow that much slower.
template <class V, int kSums, int C = V::kChains, class F>
inline void sums_over(int64_t D, typename V::T* totals, F f) {
  V s[C][kSums];
  UNROLLED for (int u = 0; u < C; ++u) UNROLLED for (int k = 0; k < kSums; ++k) s[u][k] = V::set(0);
  int64_t i = 0;
  for (; i + C * V::L <= D; i += C * V::L) UNROLLED for (int u = 0; u < C; ++u) f(s[u], i + u * V::L, int64_t(V::L));
  if constexpr (C > 1)
    for (; i + V::L <= D; i += V::L) f(s[0], i, int64_t(V::L));
  if (i < D) f(s[C > 1], i, D - i);
  UNROLLED for (int k = 0; k < kSums; ++k) {
    auto one = joined(s[0][k]);
    if constexpr (C > 1) one = one + joined(s[1][k]);
    if constexpr (C == 4) one = one + (s[2][k] + s[3][k]);
    totals[k] = sum(one);
  }
}
// The sum of all lanes of C vectors, in double.
template <class V, int C>
inline double wide_sum(const V (&x)[C]) {
  double sum[V::L] = {};
  for (int u = 0; u < C; ++u) {
    typename V::T lanes[V::L];
    keep(x[u], lanes);
    for (int j = 0; j < V::L; ++j) sum[j] += double(lanes[j]);
  }
  for (int n = V::L / 2; n > 0; n /= 2)
    for (int j = 0; j < n; ++j) sum[j] += sum[j + n];
  return sum[0];
}
template <class V, class O, int C>
inline double wide_sum(const Two<V, O> (&x)[C]) {
  V both[2 * C];
  UNROLLED for (int u = 0; u < C; ++u) both[2 * u] = x[u].a, both[2 * u + 1] = x[u].b;
  return wide_sum(both);
}
// The same, the lanes of every chain added in double: for a sum that something close to it is subtracted from.
template <class V, int kSums, class F>
inline void wide_sums_over(int64_t D, double* totals, F f) {
  constexpr int C = V::kChains, L = V::L;
  V s[C][kSums];
  UNROLLED for (int u = 0; u < C; ++u) UNROLLED for (int k = 0; k < kSums; ++k) s[u][k] = V::set(0);
  int64_t i = 0;
  for (; i + C * L <= D; i += C * L) UNROLLED for (int u = 0; u < C; ++u) f(s[u], i + u * L, int64_t(L));
  for (; i + L <= D; i += L) f(s[0], i, int64_t(L));
  if (i < D) f(s[1], i, D - i);
  UNROLLED for (int k = 0; k < kSums; ++k) {
    V chains[C];
    UNROLLED for (int u = 0; u < C; ++u) chains[u] = s[u][k];
    totals[k] = wide_sum(chains);
  }
}

// One sum: f(s, i, n) is s with the terms at [i, i + n).
template <class V, int C = V::kChains, class F>
inline typename V::T sum_over(int64_t D, F f) {
  typename V::T total;
  sums_over<V, 1, C>(D, &total, [&](V* s, int64_t i, int64_t n) { *s = f(*s, i, n); });
  return total;
}

// The largest of f(i, n) over a row. A NaN may be lost: sums over the same row keep it.
template <class V, class F>
inline typename V::T max_over(int64_t D, F f) {
  const V lowest = V::set(-INFINITY);
  constexpr int C = V::kChains;
  V m[C];
  UNROLLED for (int u = 0; u < C; ++u) m[u] = lowest;
  int64_t i = 0;
  for (; i + C * V::L <= D; i += C * V::L)
    UNROLLED for (int u = 0; u < C; ++u) m[u] = max(m[u], f(i + u * V::L, int64_t(V::L)));
  for (; i + V::L <= D; i += V::L) m[0] = max(m[0], f(i, int64_t(V::L)));
  if (i < D) m[1] = max(m[1], inside(f(i, D - i), D - i, lowest));
  UNROLLED for (int u = 1; u < C; ++u) m[0] = max(m[0], m[u]);
  return max_of(m[0]);
}
