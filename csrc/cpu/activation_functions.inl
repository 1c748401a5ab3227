// silu, relu and gelu, with their derivatives.

template <class V>
struct Response {  // act(x) and its derivative, from one exponential
  V y, slope;
};

// x * sigmoid(u) and its derivative, given u(x) and u'(x), for u within [-87, 87]: beyond, the sigmoid is 0 or 1.
template <class V>
inline Response<V> sigmoid_gate(V x, V bounded, V u, V du) {
  const V one = V::set(1), e = exp_minus(u), s = one / (one + e), xs = bounded * s;
  return {max(V::set(-87), x) * s, fma(xs * du, e * s, s)};  // e * s is 1 - s, without its cancellation
}

// The value at -inf is the limit, 0, and the derivative is finite everywhere: hence the bounded x.
template <class V>
struct Silu {
  static Response<V> of(V x) {
    const V bounded = within(x, 87);
    return sigmoid_gate(x, bounded, bounded, V::set(1));
  }
};
template <class V>
struct Relu {
  static Response<V> of(V x) {
    const V zero = V::set(0);
    return {max(zero, x), select_lt(zero, x, V::set(1), zero)};
  }
};
template <class V>
struct GeluTanh {  // (1 + tanh(u / 2)) / 2 = sigmoid(u), with u = sqrt(8 / pi) (x + 0.044715 x^3)
  static Response<V> of(V x) {
    using T = typename V::T;
    constexpr double a = 1.5957691216057307, b = a * 0.044715;
    const V bounded = within(x, T(9.96)), xx = bounded * bounded;
    const V u = bounded * fma(xx, V::set(T(b)), V::set(T(a))), du = fma(xx, V::set(T(3 * b)), V::set(T(a)));
    return sigmoid_gate(x, bounded, u, du);
  }
};
template <class V>
struct GeluErf {  // x Phi(x) = max(x, 0) - |x| tail(|x|)
  static Response<V> of(V x) {
    using T = typename V::T;
    const V zero = V::set(0), bounded = within(x, 13), a = max(bounded, zero - bounded);
    const V e = exp_fma_bounded(a, a * V::set(T(-0.5)), zero, zero), tail = e * normal_tail_over_exp(a);
    const V below = select_lt(x, zero, tail, V::set(1) - tail);  // Phi(x)
    return {max(zero, x) - a * tail, fma(bounded * e, V::set(T(0.3989422804014327)), below)};
  }
};

#define BY_ACTIVATION(activation, kernel, ...)       \
  switch (activation) {                              \
    case kRelu:                                      \
      return kernel<V, S, Relu<V>>(__VA_ARGS__);     \
    case kSilu:                                      \
      return kernel<V, S, Silu<V>>(__VA_ARGS__);     \
    case kGeluTanh:                                  \
      return kernel<V, S, GeluTanh<V>>(__VA_ARGS__); \
    default:                                         \
      return kernel<V, S, GeluErf<V>>(__VA_ARGS__);  \
  }
