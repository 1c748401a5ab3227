// AdamW: p -= lr * (weight_decay * p + m' / (sqrt(v') + eps)), with the moments m and v of the gradient in the compute
// type, m' and v' without the bias of their zero beginning.

template <class V, class S, bool kAmsgrad>
void adamw_as(const AdamW& a, int64_t begin, int64_t end) {
  using T = typename V::T;
  S* p = (S*)a.p + begin;
  const S* g = (const S*)a.grad + begin;
  T *m = (T*)a.m + begin, *v = (T*)a.v + begin, *v_max = kAmsgrad ? (T*)a.v_max + begin : nullptr;
  const V sign = V::set(a.maximize ? T(-1) : T(1)), decay = V::set(T(1 - a.lr * a.weight_decay));
  const V rest1 = V::set(T(1 - a.beta1)), beta2 = V::set(T(a.beta2)), rest2 = V::set(T(1 - a.beta2));
  const V step = V::set(T(-a.lr / a.bias1)), per_root_bias2 = V::set(T(1 / ::sqrt(a.bias2))), eps = V::set(T(a.eps));
  for_vectors<V>(end - begin, [&](int64_t i, int64_t n) {
    const V d = load<V>(g + i, n) * sign, m_old = load<V>(m + i, n);
    const V m_new = fma(d - m_old, rest1, m_old), v_new = fma(load<V>(v + i, n), beta2, d * d * rest2);
    store(m_new, m + i, n);
    store(v_new, v + i, n);
    V top = v_new;
    if (kAmsgrad) {
      top = max(load<V>(v_max + i, n), v_new);
      store(top, v_max + i, n);
    }
    store(fma(step, m_new / fma(sqrt(top), per_root_bias2, eps), load<V>(p + i, n) * decay), p + i, n);
  });
}
template <class V, class S>
void adamw(const AdamW& a, int64_t begin, int64_t end) {
  a.v_max ? adamw_as<V, S, true>(a, begin, end) : adamw_as<V, S, false>(a, begin, end);
}

constexpr AdamWKernels kTable = {PER_TYPE(adamw)};
