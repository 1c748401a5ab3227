// A word is what the matrix products (tile.inl) multiply: how one is broadcast, how a vector of them is loaded.

template <class V, class W>
struct Words {  // one number a word
  static constexpr int kPer = 1;
  using Vector = V;
  static Vector broadcast(const W* p) { return V::set(*p); }
  static Vector load(const W* p) { return V::load(p); }
  static V dot(Vector a, Vector b, V c) { return fma(a, b, c); }
};
