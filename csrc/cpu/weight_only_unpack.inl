// Packed weights as numbers again: as they lie in a matrix [N, K], or in the panels that a matrix product reads.

// Column k + j of the V::L rows of a panel from r, for every j: 8 columns are whole words, of 4 bits as of 8.
template <int kBits, class V>
inline void unpacked(const WeightOnly& a, int64_t panel, int64_t r, int64_t k, V* to) {
  constexpr int kWord = 32 / kBits;
  const int64_t place = (panel * (packed_columns(a) / a.group) + k / a.group) * kPanel + r;
  const V scale = per_row<kBits, V>(a.scales, place);
  const V offset = a.offsets ? per_row<kBits, V>(a.offsets, place) : V::set(0);
  const int32_t* w = panel_words<kBits>(a, panel) + k / kWord * kPanel + r;
  UNROLLED for (int j = 0; j < V::L; ++j) {
    const int at = j % kWord, left = kBits == 8 ? 24 - 8 * at : 28 - 8 * (at % 4) - 4 * (at / 4);
    to[j] = fma(V::template field<kBits>(w + j / kWord * kPanel, left), scale, offset);
  }
}

// Rows of w in a storage type: out[n][k] for the panels [begin, end), out starting at the first of them.
template <int kBits, class V, class S>
void unpack(const WeightOnly& a, int64_t begin, int64_t end, S* out) {
  for (int64_t panel = begin; panel < end; ++panel)
    for (int64_t r = 0; r < kPanel; r += V::L)
      for (int64_t k = 0; k < a.K; k += V::L) {
        V t[V::L];
        unpacked<kBits>(a, panel, r, k, t);
        transpose(t);
        const int64_t n = panel * kPanel + r, columns = a.K - k < V::L ? a.K - k : V::L;
        for (int64_t i = 0; i < V::L && n + i < a.N; ++i)
          store(t[i], out + (n + i - begin * kPanel) * a.K + k, columns);
      }
}
template <class V, class S>
void dequantize(const WeightOnly& a, int64_t begin, int64_t end, void* out) {
  a.bits == 8 ? unpack<8, V>(a, begin, end, (S*)out) : unpack<4, V>(a, begin, end, (S*)out);
}

// Element (n, k) of w at panels[k / width][n][k % width], both counted from the block's first: what x [M, N] is
// multiplied with where y = x w. Columns past the block's are written up to a whole vector.
template <int kBits, class V>
void block(const WeightOnly& a, const WeightBlock& b, float* panels, int64_t width) {
  for (int64_t n = 0; n < b.rows; n += V::L) {
    const int64_t rows = b.rows - n < V::L ? b.rows - n : V::L, first = b.n + n;
    for (int64_t k = 0; k < b.columns; k += V::L) {
      V t[V::L];
      unpacked<kBits>(a, first / kPanel, first % kPanel, b.k + k, t);
      transpose(t);
      float* to = panels + k / width * b.rows * width + n * width + k % width;
      if (rows == V::L)
        UNROLLED for (int i = 0; i < V::L; ++i) t[i].store(to + i * width);
      else
        for (int64_t i = 0; i < rows; ++i) t[i].store(to + i * width);
    }
  }
}
// Element (n, k) at panels[n / width][k][n % width]: the same for y = x w^T. Rows that lie together stay together.
template <int kBits, class V>
void transposed_block(const WeightOnly& a, const WeightBlock& b, float* panels, int64_t width) {
  for (int64_t n = 0; n < b.rows; n += V::L) {
    float* to = panels + n / width * b.columns * width + n % width;
    for (int64_t k = 0; k < b.columns; k += V::L) {
      V t[V::L];
      unpacked<kBits>(a, (b.n + n) / kPanel, (b.n + n) % kPanel, b.k + k, t);
      UNROLLED for (int j = 0; j < V::L; ++j) if (k + j < b.columns) t[j].store(to + (k + j) * width);
    }
  }
}
