// Gated activations, act(gate) * up, and act(x + bias), forward and backward.
#include "activation_functions.inl"

// f(row, column, n) over the elements [begin, end) of rows of D, row by row.
template <class F>
inline void for_pieces(int64_t D, int64_t begin, int64_t end, F f) {
  while (begin < end) {
    const int64_t row = begin / D, column = begin % D, rest = D - column, n = rest < end - begin ? rest : end - begin;
    f(row, column, n);
    begin += n;
  }
}

template <class V, class S, class Act>
void gated_fwd_as(const Gated& a, int64_t begin, int64_t end) {
  for_pieces(a.D, begin, end, [&](int64_t row, int64_t column, int64_t count) {
    const S* gate = (const S*)a.gate + row * a.gate_stride + column;
    const S* up = (const S*)a.up + row * a.up_stride + column;
    S* y = (S*)a.y + row * a.D + column;
    for_vectors<V>(
        count, [&](int64_t i, int64_t n) { store(Act::of(load<V>(gate + i, n)).y * load<V>(up + i, n), y + i, n); });
  });
}
template <class V, class S, class Act>
void gated_bwd_as(const Gated& a, int64_t begin, int64_t end) {
  for_pieces(a.D, begin, end, [&](int64_t row, int64_t column, int64_t count) {
    const S* gate = (const S*)a.gate + row * a.gate_stride + column;
    const S* up = (const S*)a.up + row * a.up_stride + column;
    const S* dy = (const S*)a.dy + row * a.D + column;
    S* dgate = (S*)a.dgate + row * a.grad_stride + column;
    S* dup = (S*)a.dup + row * a.grad_stride + column;
    for_vectors<V>(count, [&](int64_t i, int64_t n) {
      const Response<V> act = Act::of(load<V>(gate + i, n));
      const V d = load<V>(dy + i, n);
      store(d * load<V>(up + i, n) * act.slope, dgate + i, n);
      store(d * act.y, dup + i, n);
    });
  });
}

template <class V, class S, class Act>
void bias_act_fwd_as(const BiasAct& a, int64_t begin, int64_t end) {
  using T = typename V::T;
  for_pieces(a.D, begin, end, [&](int64_t row, int64_t column, int64_t count) {
    const S* x = (const S*)a.x + row * a.D + column;
    const T* bias = (const T*)a.bias + (a.bias ? column : 0);
    S* y = (S*)a.y + row * a.D + column;
    for_vectors<V>(count, [&](int64_t i, int64_t n) {
      const V v = load<V>(x + i, n);
      store(Act::of(a.bias ? v + load<V>(bias + i, n) : v).y, y + i, n);
    });
  });
}

// Rows [begin, end): dx = dy * act'(x + bias), and its sum over the rows into this stripe's partial sums.
template <class V, class S, class Act>
void bias_act_bwd_as(const BiasAct& a, int64_t stripe, int64_t begin, int64_t end) {
  using T = typename V::T;
  const T* bias = (const T*)a.bias;
  T* dbias = a.dbias ? (T*)a.dbias + stripe * a.D : nullptr;
  if (dbias) memset(dbias, 0, a.D * sizeof(T));
  for (int64_t row = begin; row < end; ++row) {
    const S *x = (const S*)a.x + row * a.D, *dy = (const S*)a.dy + row * a.D;
    S* dx = (S*)a.dx + row * a.D;
    for_vectors<V>(a.D, [&](int64_t i, int64_t n) {
      const V v = load<V>(x + i, n);
      const V d = load<V>(dy + i, n) * Act::of(bias ? v + load<V>(bias + i, n) : v).slope;
      store(d, dx + i, n);
      if (dbias) store(load<V>(dbias + i, n) + d, dbias + i, n);
    });
  }
}

template <class V, class S>
void gated_fwd(const Gated& a, int64_t begin, int64_t end) {
  BY_ACTIVATION(a.activation, gated_fwd_as, a, begin, end)
}
template <class V, class S>
void gated_bwd(const Gated& a, int64_t begin, int64_t end) {
  BY_ACTIVATION(a.activation, gated_bwd_as, a, begin, end)
}
template <class V, class S>
void bias_act_fwd(const BiasAct& a, int64_t begin, int64_t end) {
  BY_ACTIVATION(a.activation, bias_act_fwd_as, a, begin, end)
}
template <class V, class S>
void bias_act_bwd(const BiasAct& a, int64_t stripe, int64_t begin, int64_t end) {
  BY_ACTIVATION(a.activation, bias_act_bwd_as, a, stripe, begin, end)
}

constexpr ActivationKernels kTable = {PER_TYPE(gated_fwd), PER_TYPE(gated_bwd), PER_TYPE(bias_act_fwd),
                                      PER_TYPE(bias_act_bwd)};
