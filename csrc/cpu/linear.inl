// linear: y = activation(x W^T + b) and its gradients. One matrix product, c = a b or c += a b, on packed blocks of b.
//
// A number of c is a sum over k in chains of kChain, in order, and belongs to one call: neither the threads nor the
// place in a tile change its rounding. Operands of 16 bits are widened where they are packed, and sums that c has no
// bits for wait in the workspace until they are complete: c is rounded once.
#include "activation_functions.inl"
#include "dot.inl"
#include "tile.inl"

constexpr int64_t kChain = 192;     // products that are summed before they are added to c
constexpr int64_t kDepth = 384;     // of a block of b, at most
constexpr int64_t kColumns = 192;   // of b that are packed together: kDepth x kColumns floats are 288 KB of L2
constexpr int64_t kWidest = 384;    // kChain x kWidest floats are as much
constexpr int64_t kRows = 96;       // rows of a that meet them before the next ones: kDepth x kRows are 144 KB more
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
    for (int64_t k = 0; k < K; ++k, to += kPanel<V>) {
      for (int64_t j = 0; j < columns; j += 64 / int64_t(sizeof(S))) PREFETCH(b.data + (k + 8) * b.row + j);
      for_vectors<V>(columns, [&](int64_t j, int64_t n) { load<V>(b.data + k * b.row + j, n).store(to + j); });
    }
    return;
  }
  for (int64_t j = 0; j < columns; j += V::L)
    for (int64_t k = 0; k < K; k += V::L) {
      const int64_t depth = K - k < V::L ? K - k : V::L;
      V square[V::L];
      for (int64_t i = 0; i < V::L; ++i) {
        PREFETCH(b.data + k + (j + V::L + i) * b.column);
        square[i] = j + i < columns ? load<V>(b.data + k + (j + i) * b.column, depth) : V::set(0);
      }
      transpose(square);
      for (int64_t i = 0; i < depth; ++i) square[i].store(to + (k + i) * kPanel<V> + j);
    }
}

// The block of a as the tiles read it: where it lies, or copied: where it is to be widened, where neighbours in k are
// far apart (a page for every k), and where rows are a multiple of 8 KB apart, as they would share sets of the caches.
template <class V, class S>
Broadcast<typename V::T> block_of_a(View<S> a, int64_t rows, int64_t K, typename V::T* to) {
  if (a.column != 1) {
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t i = 0; i < rows; i += 64 / int64_t(sizeof(S))) PREFETCH(a.data + (k + 8) * a.column + i);
      for_vectors<V>(
          rows, [&](int64_t i, int64_t n) { store(load<V>(a.data + k * a.column + i, n), to + k * kRows + i, n); });
    }
    return {to, 1, kRows};
  }
  if constexpr (!kNarrow<V, S>)
    if (a.row * int64_t(sizeof(S)) % 8192) return {a.data, a.row, 1};
  constexpr int64_t kRow = kDepth + 64 / int64_t(sizeof(typename V::T));
  for (int64_t i = 0; i < rows; ++i)
    for_vectors<V>(K, [&](int64_t k, int64_t n) {
      PREFETCH(a.data + (i + 2) * a.row + k);
      load<V>(a.data + i * a.row + k, n).store(to + i * kRow + k);
    });
  return {to, kRow, 1};
}

// The block of a that comes next, fetched into L2 line by line while the tiles of this one are summed.
struct Ahead {
  const char* data = nullptr;
  int64_t step = 0, bytes = 0, rows = 0, lines = 0, at = 0;  // of a row: step and length; how many lines a tile

  template <class S>
  Ahead(View<S> a, int64_t M, int64_t K, int64_t tiles) {
    constexpr int64_t size = sizeof(S);
    data = (const char*)a.data;
    if (a.column == 1)
      step = a.row * size, bytes = K * size, rows = M;
    else
      step = a.column * size, bytes = M * size, rows = K;
    lines = (rows * ((bytes + 63) / 64) + tiles - 1) / tiles;
  }
  Ahead() = default;
  INLINED void fetch() {
    for (int64_t i = 0; i < lines && rows > 0; ++i, at += 64) {
      if (at >= bytes) {
        at = 0, data += step;
        if (--rows == 0) return;
      }
      PREFETCH_L2(data + at);
    }
  }
};

template <class T>
struct Block {  // of a, and whether its products are added to c
  Broadcast<T> a;
  int64_t rows, K, chain;
  bool add;
  int64_t c_row;
  Ahead ahead;
};

// c (+)= a times one packed panel, in tiles of R rows and the rest in smaller ones; c is fetched while a tile's
// products are summed.
template <int R, int N, class V, class T>
INLINED inline void tiles_of_c(int64_t i, Block<T>& block, const T* panel, T* c) {
  for (; i < block.rows && Tiles::height(block.rows - i, N) >= R; i += R) {
    T* to = c + i * block.c_row;
    for (int64_t r = 0; r < R; ++r)
      for (int64_t j = 0; j < N * V::L; j += 64 / int64_t(sizeof(T))) PREFETCH(to + r * block.c_row + j);
    block.ahead.fetch();
    int64_t k = 0;
    do {
      const int64_t depth = block.K - k < block.chain ? block.K - k : block.chain;
      const T* b = panel + k * kPanel<V>;
      if (block.add || k)
        tile<Start::kAdd, R, N, V>(block.a.at(i, k), b, kPanel<V>, depth, to, block.c_row, nullptr);
      else
        tile<Start::kZero, R, N, V>(block.a.at(i, k), b, kPanel<V>, depth, to, block.c_row, nullptr);
    } while ((k += block.chain) < block.K);
  }
  if constexpr (R > 1) tiles_of_c<Tiles::below(R), N, V>(i, block, panel, c);
}
template <int N, class V, class T>
NOINLINE void columns_of_c(int64_t vectors, Block<T>& block, const T* panel, T* c) {
  if (vectors == N) return tiles_of_c<Tiles::rows(N), N, V>(0, block, panel, c);
  if constexpr (N > 1) columns_of_c<N - 1, V>(vectors, block, panel, c);
}

// Of `columns` columns; those that do not fill a vector go by way of `edge`.
template <class V, class T>
void times_panel(Block<T>& block, const T* panel, int64_t columns, T* c, T* edge) {
  if (columns % V::L == 0) return columns_of_c<Tiles::kColumns, V>(columns / V::L, block, panel, c);
  const int64_t vectors = columns / V::L + 1;
  for (int64_t i = 0; i < block.rows; i += kTallest) {
    const int64_t rows = block.rows - i < kTallest ? block.rows - i : kTallest;
    int64_t k = 0;
    do {
      const int64_t depth = block.K - k < block.chain ? block.K - k : block.chain;
      product<Start::kZero, V>(rows, vectors, block.a.at(i, k), panel + k * kPanel<V>, kPanel<V>, depth, edge,
                               kPanel<V>);
      for (int64_t r = 0; r < rows; ++r)
        for_vectors<V>(columns, [&](int64_t j, int64_t n) {
          T* to = c + (i + r) * block.c_row + j;
          const V sum = V::load(edge + r * kPanel<V> + j);
          store(block.add || k ? sum + load<V>(to, n) : sum, to, n);
        });
    } while ((k += block.chain) < block.K);
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
    b = arena.take<T>(kDepth * (kColumns + kPanel<V>));
    a = arena.take<T>((kDepth + 64 / int64_t(sizeof(T))) * kRows);
    edge = arena.take<T>(kTallest * kPanel<V>);
    if (kNarrow<V, S>) sums = arena.take<T>(kWaiting * kWidest);
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
  const int64_t chains = (g.K + kChain - 1) / kChain;
  const int64_t chain =
      chains ? ((g.K + chains - 1) / chains + V::L - 1) / V::L * V::L : 1;  // of one size, if they can
  // Of an a that is copied, the fewer blocks of columns the better; its rows, and those of one chain, are too short for
  // the hardware to see a stream in each.
  const bool wide = a.column != 1 || chains == 1;
  const int64_t depth = wide ? chain : chain * (kDepth / kChain), most = wide ? kWidest : kColumns;
  const int64_t together = kNarrow<V, S> ? kWaiting : row_end - row_begin;
  for (int64_t n = begin; n < end; n += most) {
    const int64_t columns = end - n < most ? end - n : most, panels = (columns + kPanel<V> - 1) / kPanel<V>;
    auto width = [&](int64_t j) { return columns - j < kPanel<V> ? columns - j : kPanel<V>; };
    for (int64_t first = row_begin; first < row_end; first += together) {
      const int64_t last = row_end - first < together ? row_end : first + together;
      auto height = [&](int64_t m) { return last - m < kRows ? last - m : kRows; };
      for (int64_t k = 0; k == 0 || k < g.K; k += depth) {
        auto length = [&](int64_t k) { return g.K - k < depth ? g.K - k : depth; };
        auto panel = [&](int64_t j) {
          return g.panels ? (const T*)g.b.data + (n + j) * g.K + k * kPanel<V> : at.b + j * depth;
        };
        for (int64_t j = 0; j < columns && !g.panels; j += kPanel<V>)
          pack_panel<V>(b.at(k, n + j), length(k), width(j), at.b + j * depth);
        for (int64_t m = first; m < last; m += kRows) {
          Sums<T> sums{at.sums + (m - first) * kWidest, kWidest};
          if constexpr (!kNarrow<V, S>) sums = {(T*)g.c + m * g.c_row + n, g.c_row};
          Block<T> block{block_of_a<V>(a.at(m, k), height(m), length(k), at.a), height(m), length(k), chain};
          block.add = k > 0 || (g.add && !kNarrow<V, S>), block.c_row = sums.row;
          const int64_t tiles = panels * (kRows / Tiles::rows(Tiles::kColumns));
          if (wide && m + kRows < last)
            block.ahead = {a.at(m + kRows, k), height(m + kRows), length(k), tiles};
          else if (wide && k + depth < g.K)
            block.ahead = {a.at(first, k + depth), height(first), length(k + depth), tiles};
          for (int64_t j = 0; j < columns; j += kPanel<V>)
            times_panel<V>(block, panel(j), width(j), sums.data + j, at.edge);
          if (k + depth >= g.K) finish<V, S>(g, sums, m, height(m), n, columns);
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
    sums = arena.take<T>(g.M * kWidest);
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
  for (int64_t n = begin; n < end; n += kWidest) {
    const int64_t columns = end - n < kWidest ? end - n : kWidest;
    dot<V>((const S*)g.b.data + n * g.b.column, g.b.column, 0, columns, at.x, x_row, g.M, g.K,
           [&](int64_t j, int64_t m, typename V::T sum) { at.sums[m * kWidest + j] = sum; });
    finish<V, S>(g, {at.sums, kWidest}, 0, g.M, n, columns);
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
