// Two vectors as one. What is computed for both at once are independent chains of instructions side by side, as the
// compiler leaves them: with one vector after another, the CPU's window of instructions that wait holds too few of a
// long chain, such as an exponential and a division, to keep its units busy.

struct Halves {  // in memory the numbers of the first vector come before those of the second
  template <class V, class S>
  static void load(const S* p, V& a, V& b) {
    a = V::load(p), b = V::load(p + V::L);
  }
  template <class V, class S>
  static void load(const S* p, int64_t n, V& a, V& b) {
    a = V::load(p, n), b = V::load(p + V::L, n - V::L);
  }
  template <class V, class S>
  static void store(V a, V b, S* p) {
    a.store(p), b.store(p + V::L);
  }
  template <class V, class S>
  static void store(V a, V b, S* p, int64_t n) {
    a.store(p, n), b.store(p + V::L, n - V::L);
  }
  template <class V, class S>
  static void stream(V a, V b, S* p) {
    a.stream(p), b.stream(p + V::L);
  }
  template <class V>
  static void inside(V& a, V& b, int64_t n, V outside) {
    a = select_lt(V::iota(), V::set(typename V::T(n)), a, outside);
    b = select_lt(V::iota(), V::set(typename V::T(n - V::L)), b, outside);
  }
};

template <class V, class Order>
struct Two {
  using T = typename V::T;
  static constexpr int L = 2 * V::L, kChains = V::kChains / 2;
  V a, b;

  static Two set(T x) { return {V::set(x), V::set(x)}; }
  template <class S>
  static Two load(const S* p) {
    Two x;
    Order::load(p, x.a, x.b);
    return x;
  }
  template <class S>
  static Two load(const S* p, int64_t n) {
    Two x;
    Order::load(p, n, x.a, x.b);
    return x;
  }
  template <class S>
  void store(S* p) const {
    Order::store(a, b, p);
  }
  template <class S>
  void store(S* p, int64_t n) const {
    Order::store(a, b, p, n);
  }
  template <class S>
  void stream(S* p) const {
    Order::stream(a, b, p);
  }
};

#define TWO template <class V, class O>
#define BOTH Two<V, O>
TWO inline BOTH operator+(BOTH x, BOTH y) { return {x.a + y.a, x.b + y.b}; }
TWO inline BOTH operator-(BOTH x, BOTH y) { return {x.a - y.a, x.b - y.b}; }
TWO inline BOTH operator*(BOTH x, BOTH y) { return {x.a * y.a, x.b * y.b}; }
TWO inline BOTH operator/(BOTH x, BOTH y) { return {x.a / y.a, x.b / y.b}; }
TWO inline BOTH fma(BOTH x, BOTH y, BOTH z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
TWO inline BOTH max(BOTH x, BOTH y) { return {max(x.a, y.a), max(x.b, y.b)}; }
TWO inline BOTH min(BOTH x, BOTH y) { return {min(x.a, y.a), min(x.b, y.b)}; }
TWO inline BOTH select_lt(BOTH x, BOTH y, BOTH z, BOTH w) {
  return {select_lt(x.a, y.a, z.a, w.a), select_lt(x.b, y.b, z.b, w.b)};
}
TWO inline BOTH zero_below(BOTH x, BOTH y, BOTH z) { return {zero_below(x.a, y.a, z.a), zero_below(x.b, y.b, z.b)}; }
TWO inline BOTH sqrt(BOTH x) { return {sqrt(x.a), sqrt(x.b)}; }
TWO inline BOTH scale_by_power_of_two(BOTH x, BOTH n_plus_magic) {
  return {scale_by_power_of_two(x.a, n_plus_magic.a), scale_by_power_of_two(x.b, n_plus_magic.b)};
}
TWO inline V joined(BOTH x) { return x.a + x.b; }
TWO inline typename V::T max_of(BOTH x) { return max_of(max(x.a, x.b)); }
TWO inline BOTH inside(BOTH x, int64_t n, BOTH outside) {
  if (n != BOTH::L) O::inside(x.a, x.b, n, outside.a);
  return x;
}
TWO inline void keep(BOTH x, typename V::T* p) { x.a.store(p), x.b.store(p + V::L); }
TWO inline void recall(const typename V::T* p, BOTH& x) { x.a = V::load(p), x.b = V::load(p + V::L); }
#undef BOTH
#undef TWO
