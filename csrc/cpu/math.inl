// Functions of a Vec, written once for every width.

inline Vec exp2(Vec x) {
  // 2^x = 2^n 2^r with n = round(x): adding 1.5 * 2^23 rounds in the adder and leaves n in the low bits of the sum. The
  // polynomial (degree 6 on [-0.5, 0.5], 9e-9) is exact at 0. Below 2^-126 the result is exactly 0; max keeps a NaN that
  // is its second argument.
  const Vec lowest = Vec::set(-126.0f), magic = Vec::set(12582912.0f);
  const Vec clamped = max(lowest, x);
  const Vec n = clamped + magic, r = clamped - (n - magic);
  Vec p = Vec::set(1.545316336e-04f);
  p = fma(p, r, Vec::set(1.339086331e-03f));
  p = fma(p, r, Vec::set(9.618083015e-03f));
  p = fma(p, r, Vec::set(5.550356954e-02f));
  p = fma(p, r, Vec::set(2.402265072e-01f));
  p = fma(p, r, Vec::set(6.931471825e-01f));
  p = fma(p, r, Vec::set(1.0f));
  return select_lt(x, lowest, Vec::set(0.0f), scale_by_power_of_two(p, n));
}

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

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

// Sum over a row of f(i, n), in four independent chains: faster, and rounding errors grow four times slower.
template <class V, class F>
inline typename V::T sum_over(int64_t D, F f) {
  V s[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
  int64_t i = 0;
  for (; i + 4 * V::L <= D; i += 4 * V::L)
    for (int u = 0; u < 4; ++u) s[u] = s[u] + f(i + u * V::L, V::L);
  for (; i + V::L <= D; i += V::L) s[0] = s[0] + f(i, V::L);
  if (i < D) s[1] = s[1] + f(i, D - i);
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}
