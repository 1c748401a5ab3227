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
FLATTENED void gated_fwd_as(const Gated& a, int64_t begin, int64_t end) {
  for_pieces(a.D, begin, end, [&](int64_t row, int64_t column, int64_t count) {
    const S* gate = (const S*)a.gate + row * a.gate_stride + column;
    const S* up = (const S*)a.up + row * a.up_stride + column;
    S* y = (S*)a.y + row * a.D + column;
    for_vectors<V>(
        count, [&](int64_t i, int64_t n) { store(Act::of(load<V>(gate + i, n)).y * load<V>(up + i, n), y + i, n); });
  });
}
template <class V, class S, class Act>
FLATTENED void gated_bwd_as(const Gated& a, int64_t begin, int64_t end) {
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
FLATTENED void bias_act_fwd_as(const BiasAct& a, int64_t begin, int64_t end) {
  using T = typename V::T;
  for_pieces(a.D, begin, end, [&](int64_t row, int64_t column, int64_t count) {
    const S* x = (const S*)a.x + row * a.D + column;
    const T* bias = a.bias ? (const T*)a.bias + column : nullptr;
    S* y = (S*)a.y + row * a.D + column;
    for_vectors<V>(count, [&](int64_t i, int64_t n) {
      const V v = load<V>(x + i, n);
      store(Act::of(bias ? v + load<V>(bias + i, n) : v).y, y + i, n);
    });
  });
}

// dx = dy * act'(x + bias) in kRows rows from `row` on, and dbias += dx; the bias is loaded, and its gradient stored,
// once for all the rows.
template <class V, class S, class Act, int kRows>
FLATTENED void bias_act_bwd_rows(const BiasAct& a, int64_t row, typename V::T* dbias) {
  using T = typename V::T;
  const int64_t D = a.D;
  const T* bias = (const T*)a.bias;
  const S *x = (const S*)a.x + row * D, *dy = (const S*)a.dy + row * D;
  S* dx = (S*)a.dx + row * D;
  for_vectors<V>(D, [&](int64_t i, int64_t n) {
    const V b = bias ? load<V>(bias + i, n) : V::set(0);
    V sum = dbias ? load<V>(dbias + i, n) : V::set(0);
    UNROLLED for (int k = 0; k < kRows; ++k) {
      const V d = load<V>(dy + k * D + i, n) * Act::of(load<V>(x + k * D + i, n) + b).slope;
      store(d, dx + k * D + i, n);
      sum = sum + d;
    }
    if (dbias) store(sum, dbias + i, n);
  });
}

// Rows [begin, end), the sum of which are the partial sums of this stripe of rows.
template <class V, class S, class Act>
void bias_act_bwd_as(const BiasAct& a, int64_t stripe, int64_t begin, int64_t end) {
  using T = typename V::T;
  constexpr int kRows = 2;
  T* dbias = a.dbias ? (T*)a.dbias + stripe * a.D : nullptr;
  if (dbias) memset(dbias, 0, a.D * sizeof(T));
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) bias_act_bwd_rows<V, S, Act, kRows>(a, row, dbias);
  for (; row < end; ++row) bias_act_bwd_rows<V, S, Act, 1>(a, row, dbias);
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

constexpr ActivationKernels kTable = {PER_WIDE(gated_fwd), PER_WIDE(gated_bwd), PER_WIDE(bias_act_fwd),
                                      PER_WIDE(bias_act_bwd)};
