// The one matrix product of the attention kernels: c[i][j] (+)= sum over k of a(i, k) * b(k, j), with b in vectors over
// j.
//
// a is only ever broadcast, so it may have any strides and is read where it lies; b and c have unit stride in j. A word
// is one number, or (avx512_bf16.cpp) a pair of bf16 that VDPBF16PS multiplies and adds in one instruction.

template <class W>
struct Broadcast {  // a(i, k) = data[i * row + k * step]
  const W* data;
  int64_t row, step;
  Broadcast at(int64_t i, int64_t k) const { return {data + i * row + k * step, row, step}; }
};

enum class Start { kZero, kAdd, kScale };  // c was zero, is added to, or is multiplied with scale[j] and added to

template <Start kStart, int R, int N, class V, class W>
INLINED inline void tile(Broadcast<W> a, const W* b, int64_t b_row, int64_t K, typename V::T* c, int64_t c_row,
                         const V* scale) {
  using X = Words<V, W>;
  using T = typename V::T;
  V sum[R][N];
  UNROLLED for (int i = 0; i < R; ++i) UNROLLED for (int j = 0; j < N; ++j) sum[i][j] = V::set(0);
  for (int64_t k = 0; k < K; ++k) {
    typename X::Vector right[N];
    UNROLLED for (int j = 0; j < N; ++j) right[j] = X::load(b + k * b_row + j * V::L);
    const W* left = a.data + k * a.step;
    UNROLLED for (int i = 0; i < R; ++i) {
      const typename X::Vector l = X::broadcast(left + i * a.row);
      UNROLLED for (int j = 0; j < N; ++j) sum[i][j] = X::dot(l, right[j], sum[i][j]);
    }
  }
  UNROLLED for (int i = 0; i < R; ++i) UNROLLED for (int j = 0; j < N; ++j) {
    T* to = c + i * c_row + j * V::L;
    // What was there comes last: the rounding errors of a long sum grow with the number of products, not of keys.
    if (kStart == Start::kAdd) sum[i][j] = sum[i][j] + V::load(to);
    if (kStart == Start::kScale) sum[i][j] = fma(V::load(to), scale[j], sum[i][j]);
    sum[i][j].store(to);
  }
}

// Rows in tiles of R, and the rest in smaller ones.
template <Start kStart, int R, int N, class V, class W>
inline void rows_in_tiles(int64_t i, int64_t rows, Broadcast<W> a, const W* b, int64_t b_row, int64_t K,
                          typename V::T* c, int64_t c_row, const V* scale) {
  for (; i < rows && Tiles::height(rows - i, N) >= R; i += R)
    tile<kStart, R, N, V>(a.at(i, 0), b, b_row, K, c + i * c_row, c_row, scale);
  if constexpr (R > 1) rows_in_tiles<kStart, Tiles::below(R), N, V>(i, rows, a, b, b_row, K, c, c_row, scale);
}
template <Start kStart, int N, class V, class W>
NOINLINE void product_columns(int64_t rows, Broadcast<W> a, const W* b, int64_t b_row, int64_t K, typename V::T* c,
                              int64_t c_row, const V* scale) {
  rows_in_tiles<kStart, Tiles::rows(N), N, V>(0, rows, a, b, b_row, K, c, c_row, scale);
}

// The product with `vectors` vectors of columns; words of b and numbers of c have the same column index.
template <Start kStart, class V, class W>
inline void product(int64_t rows, int64_t vectors, Broadcast<W> a, const W* b, int64_t b_row, int64_t K,
                    typename V::T* c, int64_t c_row, const V* scale = nullptr) {
  while (vectors > 0) {
    const int64_t n = vectors < Tiles::kColumns ? vectors : Tiles::kColumns;
    if (n == 1) product_columns<kStart, 1, V>(rows, a, b, b_row, K, c, c_row, scale);
    if constexpr (Tiles::kColumns >= 2)
      if (n == 2) product_columns<kStart, 2, V>(rows, a, b, b_row, K, c, c_row, scale);
    if constexpr (Tiles::kColumns == 4) {
      if (n == 3) product_columns<kStart, 3, V>(rows, a, b, b_row, K, c, c_row, scale);
      if (n == 4) product_columns<kStart, 4, V>(rows, a, b, b_row, K, c, c_row, scale);
    }
    vectors -= n;
    b += n * V::L;
    c += n * V::L;
    scale += kStart == Start::kScale ? n : 0;
  }
}
