// Rows of few columns, side by side: each lane of a vector is a row, and what is summed over a row needs no sum over
// lanes. A row that is shorter than a few vectors takes longer for that, and for its last vector, than for its numbers.

constexpr int64_t kFewColumns = 64;  // that rows have at most to be taken so

template <class V>
struct SingleOf {
  using type = V;
};
template <class V, class O>
struct SingleOf<Two<V, O>> {
  using type = V;
};

// columns[c] = x[:, c] of x [rows, D], rows <= V::L; lanes of no row are 0. Vectors as a whole wherever they end within
// x. `columns` has room for D in whole vectors.
template <class V, class S>
inline void load_columns(const S* x, int64_t rows, int64_t D, V* columns) {
  for (int64_t c = 0; c < D; c += V::L) {
    V* block = columns + c;
    for (int64_t r = 0; r < V::L; ++r) {
      const int64_t i = r * D + c;
      block[r] = r >= rows              ? V::set(0)
                 : i + V::L <= rows * D ? V::load(x + i)
                                        : V::load(x + i, D - c < V::L ? D - c : V::L);
    }
    transpose(block);
  }
}

// The reverse, which destroys the columns. What a vector writes past its row's end is written over: rows go upwards,
// the first columns come last.
template <class V, class S>
inline void store_columns(V* columns, S* x, int64_t rows, int64_t D) {
  for (int64_t c = (D - 1) / V::L * V::L; c >= 0; c -= V::L) {
    V* block = columns + c;
    transpose(block);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = r * D + c;
      i + V::L <= rows* D ? block[r].store(x + i) : block[r].store(x + i, D - c < V::L ? D - c : V::L);
    }
  }
}
