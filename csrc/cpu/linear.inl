// linear: y = activation(x W^T + b) and its gradients. One matrix product, c = a b or c += a b, on packed blocks of b.
//
// A number of c is a sum over k in blocks of kDepth, in order, and belongs to one call: neither the threads nor the
// place in a tile change its rounding.
#include "activation_functions.inl"
#include "tile.inl"

constexpr int64_t kDepth = 192;  // of a block: how many products are summed before they are added to c
constexpr int64_t kBlock = 384;  // columns of b that are packed together: kDepth x kBlock floats are 288 KB of L2
constexpr int64_t kRows = 96;    // rows of a that meet them before the next ones: kDepth x kRows are 72 KB more
constexpr int64_t kTallest = 8;  // rows of any tile
template <class V>
constexpr int64_t kPanel = Tiles::kColumns * V::L;  // columns of a packed panel: what one tile is wide

template <class T>
struct View {  // of an operand: element (i, j) is data[i * row + j * column], and row or column is 1
  const T* data;
  int64_t row, column;
  View at(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
};

// K rows of at most kPanel columns of b, one after the other; zeros fill the last vector.
template <class V, class T>
void pack_panel(View<T> b, int64_t K, int64_t columns, T* to) {
  if (b.column == 1) {
    for (int64_t k = 0; k < K; ++k, to += kPanel<V>)
      for_vectors<V>(columns, [&](int64_t j, int64_t n) { load<V>(b.data + k * b.row + j, n).store(to + j); });
    return;
  }
  for (int64_t j = 0; j < columns; j += V::L)
    for (int64_t k = 0; k < K; k += V::L) {
      const int64_t depth = K - k < V::L ? K - k : V::L;
      V square[V::L];
      for (int64_t i = 0; i < V::L; ++i)
        square[i] = j + i < columns ? load<V>(b.data + k + (j + i) * b.column, depth) : V::set(0);
      transpose(square);
      for (int64_t i = 0; i < depth; ++i) square[i].store(to + (k + i) * kPanel<V> + j);
    }
}

// The block of a as the tiles read it: where it lies, or, where neighbours in k are far apart (a page for every k, and
// often the same set of the cache), copied.
template <class V, class T>
Broadcast<T> block_of_a(View<T> a, int64_t rows, int64_t K, T* to) {
  if (a.column == 1) return {a.data, a.row, 1};
  for (int64_t k = 0; k < K; ++k)
    for_vectors<V>(rows,
                   [&](int64_t i, int64_t n) { store(load<V>(a.data + k * a.column + i, n), to + k * kRows + i, n); });
  return {to, 1, kRows};
}

// c (+)= a times one packed panel, tile by tile; c is fetched while a tile's products are summed. Columns that do not
// fill a vector go by way of `edge`.
template <class V, class T>
void times_panel(Broadcast<T> a, const T* panel, int64_t rows, int64_t columns, int64_t K, T* c, int64_t c_row,
                 bool add, T* edge) {
  const int64_t vectors = (columns + V::L - 1) / V::L, tile_rows = Tiles::rows(vectors);
  for (int64_t i = 0; i < rows; i += tile_rows, c += tile_rows * c_row) {
    const int64_t n = rows - i < tile_rows ? rows - i : tile_rows;
    for (int64_t r = 0; r < n; ++r)
      for (int64_t j = 0; j < columns; j += 64 / int64_t(sizeof(T))) PREFETCH(c + r * c_row + j);
    if (columns % V::L == 0) {
      if (add)
        product<Start::kAdd, V>(n, vectors, a.at(i, 0), panel, kPanel<V>, K, c, c_row);
      else
        product<Start::kZero, V>(n, vectors, a.at(i, 0), panel, kPanel<V>, K, c, c_row);
      continue;
    }
    product<Start::kZero, V>(n, vectors, a.at(i, 0), panel, kPanel<V>, K, edge, kPanel<V>);
    for (int64_t r = 0; r < n; ++r)
      for_vectors<V>(columns, [&](int64_t j, int64_t lanes) {
        const V sum = V::load(edge + r * kPanel<V> + j);
        store(add ? sum + load<V>(c + r * c_row + j, lanes) : sum, c + r * c_row + j, lanes);
      });
  }
}

// What is left to do for a block of c, at (row, column), once its sums are complete: while they are in the cache, the
// bias and the activation.
template <class V, class T>
void add_bias(const Gemm& g, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  const T* bias = (const T*)g.bias + column;
  T* c = (T*)g.c + row * g.c_row + column;
  for (int64_t i = 0; i < rows; ++i, c += g.c_row)
    for_vectors<V>(columns, [&](int64_t j, int64_t n) { store(load<V>(c + j, n) + load<V>(bias + j, n), c + j, n); });
}
template <class V, class T, class Act>
void add_bias_and_activate(const Gemm& g, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  const T* bias = g.bias ? (const T*)g.bias + column : nullptr;
  const bool keep = g.y != g.c && bias;
  for (int64_t i = row; i < row + rows; ++i) {
    T *c = (T*)g.c + i * g.c_row + column, *y = (T*)g.y + i * g.c_row + column;
    for_vectors<V>(columns, [&](int64_t j, int64_t n) {
      V v = load<V>(c + j, n);
      if (bias) v = v + load<V>(bias + j, n);
      if (keep) store(v, c + j, n);
      store(Act::of(v).y, y + j, n);
    });
  }
}
template <class V, class S>
void finish(const Gemm& g, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  if (g.y) BY_ACTIVATION(g.activation, add_bias_and_activate, g, row, rows, column, columns)
  if (g.bias) add_bias<V, S>(g, row, rows, column, columns);
}

template <class V>
struct GemmMemory {
  using T = typename V::T;
  Arena arena;
  T *b, *a, *edge;
  explicit GemmMemory(void* memory) : arena{(char*)memory, 0} {
    b = arena.take<T>(kDepth * (kBlock + kPanel<V>));
    a = arena.take<T>(kDepth * kRows);
    edge = arena.take<T>(kTallest * kPanel<V>);
  }
};
template <class V, class S>
int64_t gemm_bytes() {
  return GemmMemory<V>(nullptr).arena.used;
}

template <class V, class S>
void gemm(const Gemm& g, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end, void* memory) {
  using T = typename V::T;
  const View<T> a{(const T*)g.a.data, g.a.row, g.a.column}, b{(const T*)g.b.data, g.b.row, g.b.column};
  if (row_begin >= row_end) return;
  GemmMemory<V> at(memory);
  const int64_t blocks = (g.K + kDepth - 1) / kDepth;
  const int64_t depth =
      blocks ? ((g.K + blocks - 1) / blocks + V::L - 1) / V::L * V::L : 1;  // of one size, if they can
  for (int64_t n = begin; n < end; n += kBlock) {
    const int64_t columns = end - n < kBlock ? end - n : kBlock;
    for (int64_t k = 0; k == 0 || k < g.K; k += depth) {
      const int64_t K = g.K - k < depth ? g.K - k : depth;
      auto width = [&](int64_t j) { return columns - j < kPanel<V> ? columns - j : kPanel<V>; };
      for (int64_t j = 0; j < columns; j += kPanel<V>) pack_panel<V>(b.at(k, n + j), K, width(j), at.b + j * depth);
      for (int64_t m = row_begin; m < row_end; m += kRows) {
        const int64_t rows = row_end - m < kRows ? row_end - m : kRows;
        const Broadcast<T> block = block_of_a<V>(a.at(m, k), rows, K, at.a);
        T* c = (T*)g.c + m * g.c_row + n;
        for (int64_t j = 0; j < columns; j += kPanel<V>)
          times_panel<V>(block, at.b + j * depth, rows, width(j), K, c + j, g.c_row, k > 0 || g.add, at.edge);
        if (k + depth >= g.K) finish<V, T>(g, m, rows, n, columns);
      }
    }
  }
}

#define FLOAT_AND_DOUBLE(kernel) {kernel<Vec, float>, nullptr, nullptr, kernel<VecD, double>}
constexpr LinearKernels kTable = {FLOAT_AND_DOUBLE(gemm_bytes), FLOAT_AND_DOUBLE(gemm)};
