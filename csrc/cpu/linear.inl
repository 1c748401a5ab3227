// linear: y = activation(x W^T + b) and its gradients. One matrix product, c = a b or c += a b, on packed blocks of b.
//
// A number of c is a sum over k in blocks of kDepth, in order, and belongs to one call: neither the threads nor the
// place in a tile change its rounding. Operands of 16 bits are widened where they are packed, and sums that c has no
// bits for wait in the workspace until they are complete: c is rounded once.
#include "activation_functions.inl"
#include "dot.inl"
#include "tile.inl"

constexpr int64_t kDepth = 192;     // of a block: how many products are summed before they are added to c
constexpr int64_t kBlock = 384;     // columns of b that are packed together: kDepth x kBlock floats are 288 KB of L2
constexpr int64_t kRows = 96;       // rows of a that meet them before the next ones: kDepth x kRows are 72 KB more
constexpr int64_t kTallest = 8;     // rows of any tile
constexpr int64_t kWaiting = 1536;  // rows whose sums wait: 2.25 MB, and b is packed anew for every so many
template <class V>
constexpr int64_t kPanel = Tiles::kColumns * V::L;  // columns of a packed panel: what one tile is wide

template <class T>
struct View {  // of an operand: element (i, j) is data[i * row + j * column], and row or column is 1
  const T* data;
  int64_t row, column;
  View at(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
};

// Whether numbers stored as S are not what the products are made of.
template <class V, class S>
constexpr bool kNarrow = sizeof(S) < sizeof(typename V::T);

// K rows of at most kPanel columns of b, one after the other; zeros fill the last vector.
template <class V, class S>
void pack_panel(View<S> b, int64_t K, int64_t columns, typename V::T* to) {
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

// The block of a as the tiles read it: where it lies, or, where it is to be widened or neighbours in k are far apart (a
// page for every k, and often the same set of the cache), copied.
template <class V, class S>
Broadcast<typename V::T> block_of_a(View<S> a, int64_t rows, int64_t K, typename V::T* to) {
  if (a.column == 1) {
    if constexpr (kNarrow<V, S>) {
      for (int64_t i = 0; i < rows; ++i)
        for_vectors<V>(K, [&](int64_t k, int64_t n) { load<V>(a.data + i * a.row + k, n).store(to + i * kDepth + k); });
      return {to, kDepth, 1};
    } else {
      return {a.data, a.row, 1};
    }
  }
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
// bias, the activation, and the rounding of what waited for it. The sums of a wide c lie in c.
template <class T>
struct Sums {
  T* data;
  int64_t row;
};

template <class V, class S>
inline V completed(const Gemm& g, V sum, const S* bias, const S* c, int64_t n) {
  if (bias) sum = sum + load<V>(bias, n);
  if constexpr (kNarrow<V, S>)
    if (g.add) sum = sum + load<V>(c, n);
  return sum;
}
template <class V, class S>
void complete(const Gemm& g, Sums<typename V::T> sums, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  const S* bias = g.bias ? (const S*)g.bias + column : nullptr;
  S* c = (S*)g.c + row * g.c_row + column;
  for (int64_t i = 0; i < rows; ++i, c += g.c_row)
    for_vectors<V>(columns, [&](int64_t j, int64_t n) {
      const V sum = load<V>(sums.data + i * sums.row + j, n);
      store(completed(g, sum, bias ? bias + j : nullptr, c + j, n), c + j, n);
    });
}
template <class V, class S, class Act>
void complete_and_activate(const Gemm& g, Sums<typename V::T> sums, int64_t row, int64_t rows, int64_t column,
                           int64_t columns) {
  const S* bias = g.bias ? (const S*)g.bias + column : nullptr;
  const bool keep = g.y != g.c && (bias || kNarrow<V, S>);
  for (int64_t i = 0; i < rows; ++i) {
    S *c = (S*)g.c + (row + i) * g.c_row + column, *y = (S*)g.y + (row + i) * g.c_row + column;
    for_vectors<V>(columns, [&](int64_t j, int64_t n) {
      const V v = completed(g, load<V>(sums.data + i * sums.row + j, n), bias ? bias + j : nullptr, c + j, n);
      if (keep) store(v, c + j, n);
      store(Act::of(v).y, y + j, n);
    });
  }
}
template <class V, class S>
void finish(const Gemm& g, Sums<typename V::T> sums, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  if (g.y) BY_ACTIVATION(g.activation, complete_and_activate, g, sums, row, rows, column, columns)
  if (g.bias || kNarrow<V, S>) complete<V, S>(g, sums, row, rows, column, columns);
}

template <class V, class S>
struct GemmMemory {
  using T = typename V::T;
  Arena arena;
  T *b, *a, *edge, *sums = nullptr;
  explicit GemmMemory(void* memory) : arena{(char*)memory, 0} {
    b = arena.take<T>(kDepth * (kBlock + kPanel<V>));
    a = arena.take<T>(kDepth * kRows);
    edge = arena.take<T>(kTallest * kPanel<V>);
    if (kNarrow<V, S>) sums = arena.take<T>(kWaiting * kBlock);
  }
};
template <class V, class S>
int64_t gemm_bytes(const Gemm&) {
  return GemmMemory<V, S>(nullptr).arena.used;
}

template <class V, class S>
void gemm(const Gemm& g, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end, void* memory) {
  using T = typename V::T;
  const View<S> a{(const S*)g.a.data, g.a.row, g.a.column}, b{(const S*)g.b.data, g.b.row, g.b.column};
  if (row_begin >= row_end) return;
  GemmMemory<V, S> at(memory);
  const int64_t blocks = (g.K + kDepth - 1) / kDepth;
  const int64_t depth =
      blocks ? ((g.K + blocks - 1) / blocks + V::L - 1) / V::L * V::L : 1;  // of one size, if they can
  const int64_t together = kNarrow<V, S> ? kWaiting : row_end - row_begin;
  for (int64_t n = begin; n < end; n += kBlock) {
    const int64_t columns = end - n < kBlock ? end - n : kBlock;
    auto width = [&](int64_t j) { return columns - j < kPanel<V> ? columns - j : kPanel<V>; };
    for (int64_t first = row_begin; first < row_end; first += together) {
      const int64_t last = row_end - first < together ? row_end : first + together;
      for (int64_t k = 0; k == 0 || k < g.K; k += depth) {
        const int64_t K = g.K - k < depth ? g.K - k : depth;
        auto panel = [&](int64_t j) {
          return g.panels ? (const T*)g.b.data + (n + j) * g.K + k * kPanel<V> : at.b + j * depth;
        };
        for (int64_t j = 0; j < columns && !g.panels; j += kPanel<V>)
          pack_panel<V>(b.at(k, n + j), K, width(j), at.b + j * depth);
        for (int64_t m = first; m < last; m += kRows) {
          const int64_t rows = last - m < kRows ? last - m : kRows;
          const Broadcast<T> block = block_of_a<V>(a.at(m, k), rows, K, at.a);
          Sums<T> sums{at.sums + (m - first) * kBlock, kBlock};
          if constexpr (!kNarrow<V, S>) sums = {(T*)g.c + m * g.c_row + n, g.c_row};
          for (int64_t j = 0; j < columns; j += kPanel<V>)
            times_panel<V>(block, panel(j), rows, width(j), K, sums.data + j, sums.row,
                           k > 0 || (g.add && !kNarrow<V, S>), at.edge);
          if (k + depth >= g.K) finish<V, S>(g, sums, m, rows, n, columns);
        }
      }
    }
  }
}

// The same for few rows of a, where b is [N, K] as torch has a weight: b is read where it lies. x is a, widened.
template <class V, class S>
struct FewRowsMemory {
  using T = typename V::T;
  Arena arena;
  T *sums, *x;
  FewRowsMemory(const Gemm& g, void* memory) : arena{(char*)memory, 0} {
    sums = arena.take<T>(g.M * kBlock);
    x = arena.take<T>(g.M * (g.K + V::L));
  }
};
template <class V, class S>
int64_t few_rows_bytes(const Gemm& g) {
  return FewRowsMemory<V, S>(g, nullptr).arena.used;
}
template <class V, class S>
void few_rows(const Gemm& g, int64_t, int64_t, int64_t begin, int64_t end, void* memory) {
  const FewRowsMemory<V, S> at(g, memory);
  const int64_t x_row = g.K + V::L;
  for (int64_t m = 0; m < g.M; ++m)
    for_vectors<V>(g.K, [&](int64_t k, int64_t n) {
      load<V>((const S*)g.a.data + m * g.a.row + k, n).store(at.x + m * x_row + k);
    });
  for (int64_t n = begin; n < end; n += kBlock) {
    const int64_t columns = end - n < kBlock ? end - n : kBlock;
    dot<V>((const S*)g.b.data + n * g.b.column, g.b.column, 0, columns, at.x, x_row, g.M, g.K,
           [&](int64_t j, int64_t m, typename V::T sum) { at.sums[m * kBlock + j] = sum; });
    finish<V, S>(g, {at.sums, kBlock}, 0, g.M, n, columns);
  }
}

// sums[n] += the rows [begin, end) of dy [M, N].
template <class V, class S>
void add_rows(const void* dy, int64_t N, int64_t begin, int64_t end, void* sums) {
  for (int64_t m = begin; m < end; ++m)
    for_vectors<V>(N, [&](int64_t j, int64_t n) {
      typename V::T* to = (typename V::T*)sums + j;
      store(load<V>(to, n) + load<V>((const S*)dy + m * N + j, n), to, n);
    });
}

template <class V, class S>
int64_t panel() {
  return kPanel<V>;
}
// b [K, N] in panels of the compute type, each of them whole: for a b that many products take.
template <class V, class S>
void pack(const Operand& b, int64_t K, int64_t N, void* panels) {
  using T = typename V::T;
  const View<S> from{(const S*)b.data, b.row, b.column};
  for (int64_t n = 0; n < N; n += kPanel<V>)
    pack_panel<V>(from.at(0, n), K, N - n < kPanel<V> ? N - n : kPanel<V>, (T*)panels + n * K);
}

#define NARROW(kernel) ENTRIES(nullptr, (kernel<Vec, bf16>), (kernel<Vec, half>), nullptr)
constexpr LinearKernels kTable = {PER_TYPE(gemm_bytes), PER_TYPE(gemm),  NARROW(few_rows_bytes), NARROW(few_rows),
                                  PER_TYPE(add_rows),   PER_TYPE(panel), PER_TYPE(pack)};
