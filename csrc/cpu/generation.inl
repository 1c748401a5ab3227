// What one new token needs beside norms, matrix-vector products and attention over the cache, on fp32.
#include "activation_functions.inl"

// (a, b) to (a cos - b sin, b cos + a sin), a and b being the two halves of x's first 2 * half numbers.
template <class V>
void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  for_vectors<V>(half, [&](int64_t i, int64_t n) {
    const V a = load<V>(x + i, n), b = load<V>(x + half + i, n), c = load<V>(cos + i, n), s = load<V>(sin + i, n);
    store(a * c - b * s, x + i, n);
    store(b * c + a * s, x + half + i, n);
  });
}

template <class V>
inline V activation(int kind, V x) {
  switch (kind) {
    case kRelu:
      return max(x, V::set(0));
    case kSilu:
      return Silu<V>::of(x).y;
    case kGeluTanh:
      return GeluTanh<V>::of(x).y;
    default:
      return GeluErf<V>::of(x).y;
  }
}

// gate = act(gate) * up, or act(gate) without an up.
template <class V>
void activate(int kind, float* gate, const float* up, int64_t n) {
  for_vectors<V>(n, [&](int64_t i, int64_t left) {
    V y = activation(kind, load<V>(gate + i, left));
    if (up) y = y * load<V>(up + i, left);
    store(y, gate + i, left);
  });
}

// x += y.
template <class V>
void add(float* x, const float* y, int64_t n) {
  for_vectors<V>(n, [&](int64_t i, int64_t left) { store(load<V>(x + i, left) + load<V>(y + i, left), x + i, left); });
}

constexpr GenerationKernels kTable = {rotate<Vec>, activate<Vec>, add<Vec>};
