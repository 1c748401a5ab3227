// y = x w for a few rows of x: the gradient of the products of decoding. Every weight is read once.
//
// Sums run over the rows of w, which lie in lanes: those of kTogether panels are added up lane by lane, then over the
// lanes, and then to y. Ranges of columns are worked on apart from each other, so that no two threads add to one sum.

constexpr int64_t kTogether = 4;

// C rows of x, from m, with the columns [begin, end).
template <int kBits, int C, class V>
void columns_of(const WeightOnly& a, int64_t m, int64_t begin, int64_t end) {
  constexpr int R = kPanel / V::L, kWord = 32 / kBits;
  const int64_t step = step_of(a), groups = packed_columns(a) / a.group, all = (a.N + kPanel - 1) / kPanel;
  for (int64_t first = 0; first < all; first += kTogether) {
    const int64_t together = all - first < kTogether ? all - first : kTogether;
    V x[kTogether][R][C], scaled[kTogether][R][C];
    for (int64_t p = 0; p < together; ++p) UNROLLED for (int r = 0; r < R; ++r) UNROLLED for (int c = 0; c < C; ++c) {
        const int64_t n = (first + p) * kPanel + r * V::L;
        x[p][r][c] = a.N > n ? load<V>(a.x + (m + c) * a.x_row + n, a.N - n) : V::set(0);
      }
    for (int64_t s = begin; s < end; s += step) {
      V offset[C];
      UNROLLED for (int c = 0; c < C; ++c) offset[c] = V::set(0);
      for (int64_t p = 0; p < together; ++p) UNROLLED for (int r = 0; r < R; ++r) {
          const int64_t place = ((first + p) * groups + s / a.group) * kPanel + r * V::L;
          const V scale = per_row<kBits, V>(a.scales, place);
          UNROLLED for (int c = 0; c < C; ++c) scaled[p][r][c] = scale * x[p][r][c];
          if (a.offsets)
            UNROLLED for (int c = 0; c < C; ++c) offset[c] =
                fma(per_row<kBits, V>(a.offsets, place), x[p][r][c], offset[c]);
        }
      V added[C];
      UNROLLED for (int c = 0; c < C; ++c) added[c] = V::set(a.offsets ? sum(offset[c]) : 0);
      for (int64_t k = s; k < s + step && k < a.K; k += V::L) {
        V lanes[C][V::L];
        for (int q = 0; q < V::L; q += 4) {  // as many sums as registers hold
          V sums[C][4];
          UNROLLED for (int c = 0; c < C; ++c) UNROLLED for (int j = 0; j < 4; ++j) sums[c][j] = V::set(0);
          for (int64_t p = 0; p < together; ++p) {
            const int32_t* w = panel_words<kBits>(a, first + p) + (k + q) / kWord * kPanel;
            const int high = kBits == 4 && q % 8 ? 4 : 0;
            UNROLLED for (int r = 0; r < R; ++r) UNROLLED for (int j = 0; j < 4; ++j) {
              const V number = V::template field<kBits>(w + r * V::L, 32 - kBits - 8 * j - high);
              UNROLLED for (int c = 0; c < C; ++c) sums[c][j] = fma(number, scaled[p][r][c], sums[c][j]);
            }
          }
          UNROLLED for (int c = 0; c < C; ++c) UNROLLED for (int j = 0; j < 4; ++j) lanes[c][q + j] = sums[c][j];
        }
        const int64_t inside = a.K - k < V::L ? a.K - k : V::L;
        UNROLLED for (int c = 0; c < C; ++c) {
          float* y = a.y + (m + c) * a.y_row + k;
          V total = sum_each(lanes[c]) + added[c];
          if (first) total = total + load<V>(y, inside);
          store(total, y, inside);
        }
      }
    }
  }
}
template <int kBits, class V>
void columns(const WeightOnly& a, int64_t begin, int64_t end) {
  int64_t m = 0;
  for (; m + 2 <= a.M; m += 2) columns_of<kBits, 2, V>(a, m, begin, end);
  for (; m < a.M; ++m) columns_of<kBits, 1, V>(a, m, begin, end);
}
