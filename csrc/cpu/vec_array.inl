// Vec as an array that the compiler vectorises as well as it can: the portable instruction set, and double everywhere.

template <class Number, int Lanes>
struct ArrayVec {
  using T = Number;
  static constexpr int L = Lanes, kChains = 4;
  T v[L];

  static ArrayVec set(T x) {
    ArrayVec r;
    for (int i = 0; i < L; ++i) r.v[i] = x;
    return r;
  }
  static ArrayVec iota() {
    ArrayVec r;
    for (int i = 0; i < L; ++i) r.v[i] = T(i);
    return r;
  }
  template <class S>
  static ArrayVec load(const S* p) {
    ArrayVec r;
    for (int i = 0; i < L; ++i) r.v[i] = T(widen(p[i]));
    return r;
  }
  template <class S>
  static ArrayVec load(const S* p, int64_t n) {  // the first n lanes, zero after them
    ArrayVec r;
    for (int i = 0; i < L; ++i) r.v[i] = i < n ? T(widen(p[i])) : T(0);
    return r;
  }
  // The signed number of kBits bits that `left` zeros push to the top of each packed word (weight_only.inl).
  template <int kBits>
  static ArrayVec field(const int32_t* p, int left) {
    constexpr uint32_t kZero = kBits == 8 ? 0x80808080u : 0x88888888u;
    ArrayVec r;
    for (int i = 0; i < L; ++i) r.v[i] = T(int32_t((uint32_t(p[i]) ^ kZero) << left) >> (32 - kBits));
    return r;
  }
  template <class S>
  void stream(S* p) const {
    store(p);
  }
  template <class S>
  void store(S* p) const {
    for (int i = 0; i < L; ++i) narrow(v[i], p[i]);
  }
  template <class S>
  void store(S* p, int64_t n) const {
    for (int i = 0; i < L; ++i)
      if (i < n) narrow(v[i], p[i]);
  }
};

#define ARRAY_VEC template <class T, int L>
#define LANES(expression)                            \
  ArrayVec<T, L> r;                                  \
  for (int i = 0; i < L; ++i) r.v[i] = (expression); \
  return r;
ARRAY_VEC ArrayVec<T, L> operator+(ArrayVec<T, L> a, ArrayVec<T, L> b){
    LANES(a.v[i] + b.v[i])} ARRAY_VEC ArrayVec<T, L> operator-(ArrayVec<T, L> a, ArrayVec<T, L> b){
    LANES(a.v[i] - b.v[i])} ARRAY_VEC ArrayVec<T, L> operator*(ArrayVec<T, L> a, ArrayVec<T, L> b){
    LANES(a.v[i] * b.v[i])} ARRAY_VEC ArrayVec<T, L> operator/(ArrayVec<T, L> a, ArrayVec<T, L> b) {
  LANES(a.v[i] / b.v[i])
}

// One rounding, as everywhere else. A machine without the instruction gets it from double, slowly: two roundings would
// make long sums of products less exact than PyTorch's.
inline float fma1(float a, float b, float c) {
#if defined(__FP_FAST_FMAF)
  return fmaf(a, b, c);
#else
  return float(double(a) * b + c);
#endif
}
inline double fma1(double a, double b, double c) { return a * b + c; }
ARRAY_VEC ArrayVec<T, L> fma(ArrayVec<T, L> a, ArrayVec<T, L> b, ArrayVec<T, L> c){LANES(fma1(a.v[i], b.v[i], c.v[i]))}

ARRAY_VEC ArrayVec<T, L> max(ArrayVec<T, L> a, ArrayVec<T, L> b){
    LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i])} ARRAY_VEC ArrayVec<T, L> min(ArrayVec<T, L> a, ArrayVec<T, L> b){
    LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i])} ARRAY_VEC ArrayVec<T, L> select_lt(ArrayVec<T, L> a, ArrayVec<T, L> b,
                                                                                 ArrayVec<T, L> x, ArrayVec<T, L> y){
    LANES(a.v[i] < b.v[i] ? x.v[i] : y.v[i])} ARRAY_VEC T
    sum(ArrayVec<T, L> a) {  // in halves: three roundings for eight lanes, not seven
  for (int n = L / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) a.v[i] += a.v[i + n];
  return a.v[0];
}
ARRAY_VEC ArrayVec<T, L> zero_below(ArrayVec<T, L> a, ArrayVec<T, L> b, ArrayVec<T, L> x) {
  return select_lt(a, b, ArrayVec<T, L>::set(0), x);
}
ARRAY_VEC T max_of(ArrayVec<T, L> a) {
  T m = a.v[0];
  for (int i = 1; i < L; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
ARRAY_VEC ArrayVec<T, L> sum_each(const ArrayVec<T, L>* r) {  // lane i is the sum of r[i]
  ArrayVec<T, L> s;
  for (int i = 0; i < L; ++i) s.v[i] = sum(r[i]);
  return s;
}
ARRAY_VEC void transpose(ArrayVec<T, L>* r) {
  for (int i = 0; i < L; ++i)
    for (int j = 0; j < i; ++j) {
      const T t = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = t;
    }
}
ARRAY_VEC ArrayVec<T, L> swap_neighbours(ArrayVec<T, L> a) { LANES(a.v[i ^ 1]) }
template <int L>
ArrayVec<float, L> scale_by_power_of_two(ArrayVec<float, L> x, ArrayVec<float, L> n_plus_magic) {
  ArrayVec<float, L> r;
  for (int i = 0; i < L; ++i) r.v[i] = as_float(as_bits(x.v[i]) + (as_bits(n_plus_magic.v[i]) << 23));
  return r;
}
template <int L>
ArrayVec<double, L> tanh(ArrayVec<double, L> a) {
  ArrayVec<double, L> r;
  for (int i = 0; i < L; ++i) r.v[i] = ::tanh(a.v[i]);
  return r;
}
template <int L>
ArrayVec<double, L> exp(ArrayVec<double, L> a) {
  ArrayVec<double, L> r;
  for (int i = 0; i < L; ++i) r.v[i] = ::exp(a.v[i]);
  return r;
}
template <int L>
ArrayVec<double, L> normal_tail_over_exp(ArrayVec<double, L> a) {
  ArrayVec<double, L> r;
  for (int i = 0; i < L; ++i) r.v[i] = 0.5 * ::erfc(a.v[i] * 0.70710678118654752440) * ::exp(0.5 * a.v[i] * a.v[i]);
  return r;
}
inline float sqrt1(float x) { return sqrtf(x); }
inline double sqrt1(double x) { return ::sqrt(x); }
ARRAY_VEC ArrayVec<T, L> sqrt(ArrayVec<T, L> a) { LANES(sqrt1(a.v[i])) }
#undef LANES
#undef ARRAY_VEC
