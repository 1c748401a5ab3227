// What one new token needs beside norms, matrix-vector products and attention over the cache, on fp32.

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
  const V zero = V::set(0), one = V::set(1), half = V::set(0.5f);
  switch (kind) {
    case kRelu:
      return max(x, zero);
    case kSilu:
      return x / (one + exp(zero - x));
    case kGeluTanh: {
      const V inner = x * fma(x * x, V::set(0.7978845608f * 0.044715f), V::set(0.7978845608f));
      return half * x * (one + tanh(inner));
    }
    default: {  // kGelu
      float lanes[V::L];
      x.store(lanes);
      for (int i = 0; i < V::L; ++i) lanes[i] = 0.5f * lanes[i] * (1.0f + erff(lanes[i] * 0.70710678f));
      return V::load(lanes);
    }
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
