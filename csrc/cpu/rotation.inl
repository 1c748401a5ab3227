// The rotation of one row of a head, as rope and the kernels that rotate on the fly need it.

// Tables of one position, spread over the R rotated elements: y[i] = x[i] c[i] + x[partner(i)] s[i], where the partner
// is the neighbour in an interleaved row, and R / 2 further or back otherwise. `whole` tables have a number for each
// element, others one for each pair. The inverse rotation is the transposed matrix.
template <class T, class Table>
inline void spread_rotation(const Table* cos, const Table* sin, int64_t R, bool interleaved, bool whole, bool inverse,
                            T* c, T* s) {
  for (int64_t pair = 0; pair < R / 2; ++pair) {
    const int64_t i = interleaved ? 2 * pair : pair, j = interleaved ? i + 1 : pair + R / 2;
    const int64_t from_i = whole ? i : pair, from_j = whole ? j : pair;
    const T si = T(widen(sin[from_i])), sj = T(widen(sin[from_j]));
    c[i] = T(widen(cos[from_i])), c[j] = T(widen(cos[from_j]));
    s[i] = inverse ? sj : -si, s[j] = inverse ? -si : sj;
  }
}

// y[0, D) is x with its first R elements rotated by tables of spread_rotation; y may be x.
template <class V, class S>
inline void rotate_row(const S* x, S* y, int64_t D, int64_t R, bool interleaved, const typename V::T* c,
                       const typename V::T* s) {
  if (interleaved) {
    for_vectors<V>(R, [&](int64_t i, int64_t n) {
      const V v = load<V>(x + i, n);
      store(fma(swap_neighbours(v), load<V>(s + i, n), v * load<V>(c + i, n)), y + i, n);
    });
  } else {
    const int64_t half = R / 2;
    for_vectors<V>(half, [&](int64_t i, int64_t n) {
      const int64_t j = i + half;
      const V a = load<V>(x + i, n), b = load<V>(x + j, n);
      store(fma(b, load<V>(s + i, n), a * load<V>(c + i, n)), y + i, n);
      store(fma(a, load<V>(s + j, n), b * load<V>(c + j, n)), y + j, n);
    });
  }
  if (x != y) for_vectors<V>(D - R, [&](int64_t i, int64_t n) { store(load<V>(x + R + i, n), y + R + i, n); });
}
