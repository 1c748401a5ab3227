// The products of few rows x, [M, K] in the compute type, with the rows of a w that is [N, K] in a storage type: w is
// read once, where it lies, and widened in registers.

// R rows of w, from n, with C rows of x, from m; out(i, j, sum). Each sum is one chain, whatever R and C are: a row of
// x gives the same bits beside others as alone.
template <int R, int C, class V, class S, class F>
inline void dot_rows(const S* w, int64_t w_row, const typename V::T* x, int64_t x_row, int64_t K, F out) {
  V sum_[R][C];
  UNROLLED for (int i = 0; i < R; ++i) UNROLLED for (int j = 0; j < C; ++j) sum_[i][j] = V::set(0);
  int64_t k = 0;
  for (; k + V::L <= K; k += V::L) {
    // The next rows are asked for while these are read: several streams that end after K numbers are too short to be
    // seen as such.
    UNROLLED for (int i = 0; i < R; ++i) PREFETCH_L2((const char*)(w + (i + R) * w_row + k));
    V left[R];
    UNROLLED for (int i = 0; i < R; ++i) left[i] = V::load(w + i * w_row + k);
    UNROLLED for (int j = 0; j < C; ++j) {
      const V right = V::load(x + j * x_row + k);
      UNROLLED for (int i = 0; i < R; ++i) sum_[i][j] = fma(left[i], right, sum_[i][j]);
    }
  }
  if (k < K)
    UNROLLED for (int j = 0; j < C; ++j) UNROLLED for (int i = 0; i < R; ++i) sum_[i][j] =
        fma(load<V>(w + i * w_row + k, K - k), load<V>(x + j * x_row + k, K - k), sum_[i][j]);
  UNROLLED for (int j = 0; j < C; ++j) UNROLLED for (int i = 0; i < R; ++i) out(i, j, sum(sum_[i][j]));
}

// out(n, m, sum) for the rows [begin, end) of w and all M rows of x.
template <int R, class V, class S, class F>
inline void dot_all_rows(const S* w, int64_t w_row, const typename V::T* x, int64_t x_row, int64_t M, int64_t K,
                         F out) {
  int64_t m = 0;
#define ROWS_OF_X(C)         \
  for (; m + C <= M; m += C) \
  dot_rows<R, C, V>(w, w_row, x + m * x_row, x_row, K, [&](int i, int j, typename V::T s) { out(i, m + j, s); })
  ROWS_OF_X(4);
  ROWS_OF_X(2);
  ROWS_OF_X(1);
#undef ROWS_OF_X
}
template <class V, class S, class F>
inline void dot(const S* w, int64_t w_row, int64_t begin, int64_t end, const typename V::T* x, int64_t x_row, int64_t M,
                int64_t K, F out) {
  int64_t n = begin;
#define ROWS_OF_W(R)           \
  for (; n + R <= end; n += R) \
  dot_all_rows<R, V>(w + n * w_row, w_row, x, x_row, M, K, [&](int i, int64_t m, typename V::T s) { out(n + i, m, s); })
  ROWS_OF_W(4);
  ROWS_OF_W(1);
#undef ROWS_OF_W
}
