// y = x w^T + bias for a few rows of x: the matrix-vector products of decoding, which read every weight once.
//
// A weight is [N, K] in a storage type, as torch has it, or packed: 8-bit or 4-bit numbers with a scale per row or per
// group of a row. Packed, 16 rows are interleaved (a panel): a line of 16 words of 32 bits holds the next 4 (or 8)
// numbers of each row, so that sums stay in their lanes. w = (code - zero) * scale + offset, with code - zero in
// [-128, 127] or [-8, 7]; of a word of 4 bits, byte i has k = i in its low and k = 4 + i in its high half.
//
// x is prepared once for all panels: cut into steps along K and, for VPDPBUSD, split into planes of 8 bits.

#include "dot.inl"

constexpr int64_t kPanel = 16;

inline int64_t packed_columns(const WeightOnly& a) { return (a.K + a.group - 1) / a.group * a.group; }
inline int64_t step_of(const WeightOnly& a) { return a.group % 64 ? 32 : 64; }  // numbers along K between two scalings

struct Prepared {  // x as the products want it, M rows of `steps` steps each
  int64_t step, steps;
  float* x;            // [M][steps * step], zeros past K; without VPDPBUSD
  int8_t* planes;      // [M][steps][planes][step]; with it
  int32_t* start;      // [M][steps][planes]: -zero * sum(plane), where a sum of products with codes starts
  float *scale, *sum;  // [M][steps]: what the planes are to be multiplied with, and the sum of x

  Prepared(const WeightOnly& a, Arena& memory) : step(step_of(a)), steps(packed_columns(a) / step) {
    const int64_t all = a.M * steps;
    sum = memory.take<float>(all);
#if defined(__AVX512VNNI__)
    planes = memory.take<int8_t>(all * a.planes * step);
    start = memory.take<int32_t>(all * a.planes);
    scale = memory.take<float>(all);
#else
    x = memory.take<float>(all * step);
#endif
  }
};

// A scale or an offset per row of a panel: fp32 for 8 bits, bf16 for 4, where they are a larger share of the memory.
template <int kBits, class V>
inline V per_row(const void* p, int64_t i) {
  if constexpr (kBits == 8) return V::load((const float*)p + i);
  return V::load((const bf16*)p + i);
}
template <int kBits>
inline const int32_t* panel_words(const WeightOnly& a, int64_t panel) {
  return (const int32_t*)a.weight + panel * packed_columns(a) * kPanel * kBits / 32;
}

// Writes one vector of results of a panel; bias and what is already there are added last.
template <class V>
inline void write(const WeightOnly& a, V y, int64_t m, int64_t n) {
  const int64_t inside = a.N - n < V::L ? a.N - n : V::L;
  if (inside <= 0) return;
  float* to = a.y + m * a.y_row + n;
  if (a.bias) y = y + load<V>(a.bias + n, inside);
  if (a.add) y = y + load<V>(to, inside);
  store(y, to, inside);
}

#if defined(__AVX512VNNI__)
#include "weight_only_vnni.inl"
#else

template <class V>
void prepare(const WeightOnly& a, void* memory) {
  Arena arena{(char*)memory, 0};
  const Prepared p(a, arena);
  for (int64_t m = 0; m < a.M; ++m) {
    float* x = p.x + m * p.steps * p.step;
    memcpy(x, a.x + m * a.x_row, a.K * sizeof(float));
    memset(x + a.K, 0, (p.steps * p.step - a.K) * sizeof(float));
    for (int64_t s = 0; s < p.steps; ++s)
      p.sum[m * p.steps + s] =
          sum_over<V>(p.step, [&](V t, int64_t i, int64_t n) { return t + load<V>(x + s * p.step + i, n); });
  }
}

// C rows of x on one panel. A chain of a whole step's 64 sums is further from the truth than a matrix product's.
constexpr int64_t kPiece = 16;
template <int kBits, int C, class V>
void panel_rows(const WeightOnly& a, const Prepared& p, int64_t panel, int64_t m) {
  constexpr int R = kPanel / V::L;
  constexpr int64_t kAhead = 4096;  // bytes; a panel is one stream
  const int32_t* w = panel_words<kBits>(a, panel);
  const int64_t steps_per_group = a.group / p.step, groups = p.steps / steps_per_group;
  V y[C][R];
  UNROLLED for (int c = 0; c < C; ++c) UNROLLED for (int r = 0; r < R; ++r) y[c][r] = V::set(0);
  for (int64_t s = 0; s < p.steps; ++s) {
    const int64_t place = (panel * groups + s / steps_per_group) * kPanel;
    const float* x = p.x + (m * p.steps + s) * p.step;
    for (int64_t piece = 0; piece < p.step; piece += kPiece) {
      V sum[C][R];
      UNROLLED for (int c = 0; c < C; ++c) UNROLLED for (int r = 0; r < R; ++r) sum[c][r] = V::set(0);
      for (int64_t k = 0; k < kPiece; k += 8, x += 8, w += kPanel * kBits / 4) {
        PREFETCH((const char*)w + kAhead);
        if (kBits == 8) PREFETCH((const char*)w + kAhead + 64);
        UNROLLED for (int j = 0; j < 8; ++j) {
          const int left = kBits == 8 ? 24 - 8 * (j % 4) : 28 - 8 * (j % 4) - 4 * (j / 4);
          UNROLLED for (int r = 0; r < R; ++r) {
            const V q = V::template field<kBits>(w + (kBits == 8 ? j / 4 * kPanel : 0) + r * V::L, left);
            UNROLLED for (int c = 0; c < C; ++c) sum[c][r] = fma(q, V::set(x[c * p.steps * p.step + j]), sum[c][r]);
          }
        }
      }
      UNROLLED for (int r = 0; r < R; ++r) {
        const V scale = per_row<kBits, V>(a.scales, place + r * V::L);
        UNROLLED for (int c = 0; c < C; ++c) y[c][r] = fma(sum[c][r], scale, y[c][r]);
      }
    }
    if (a.offsets) UNROLLED for (int r = 0; r < R; ++r) {
        const V offset = per_row<kBits, V>(a.offsets, place + r * V::L);
        UNROLLED for (int c = 0; c < C; ++c) y[c][r] = fma(offset, V::set(p.sum[(m + c) * p.steps + s]), y[c][r]);
      }
  }
  UNROLLED for (int c = 0; c < C; ++c) UNROLLED for (int r = 0; r < R; ++r)
      write(a, y[c][r], m + c, panel * kPanel + r * V::L);
}
#endif

inline int64_t prepared_bytes(const WeightOnly& a) {
  Arena count{nullptr, 0};
  Prepared(a, count);
  return count.used;
}

// The panels [begin, end): every row of x on one before the next is read.
template <int kBits, class V>
void panels(const WeightOnly& a, const void* memory, int64_t begin, int64_t end) {
  Arena arena{(char*)memory, 0};
  const Prepared p(a, arena);
  for (int64_t panel = begin; panel < end; ++panel) {
    int64_t m = 0;
    for (; m + 4 <= a.M; m += 4) panel_rows<kBits, 4, V>(a, p, panel, m);
    for (; m + 2 <= a.M; m += 2) panel_rows<kBits, 2, V>(a, p, panel, m);
    for (; m < a.M; ++m) panel_rows<kBits, 1, V>(a, p, panel, m);
  }
}

#include "weight_only_unpack.inl"
#include "weight_only_bwd.inl"

// The rows [begin, end) of a weight in a storage type.
template <class V, class S>
void rows(const WeightOnly& a, int64_t begin, int64_t end) {
  dot<V>((const S*)a.weight, a.K, begin, end, a.x, a.x_row, a.M, a.K, [&](int64_t n, int64_t m, float sum) {
    float* y = a.y + m * a.y_row + n;
    *y = sum + (a.bias ? a.bias[n] : 0.0f) + (a.add ? *y : 0.0f);
  });
}

template <class V, class S>
void widen_numbers(const void* x, float* y, int64_t n) {
  for_vectors<V>(n, [&](int64_t i, int64_t left) { store(load<V>((const S*)x + i, left), y + i, left); });
}
template <class V, class S>
void narrow_numbers(const float* x, void* y, int64_t n) {
  for_vectors<V>(n, [&](int64_t i, int64_t left) { store(load<V>(x + i, left), (S*)y + i, left); });
}

// No entries for double: what decoding wants is fewer bits, not more.
#define PER_FLOAT(kernel) ENTRIES((kernel<Vec, float>), (kernel<Vec, bf16>), (kernel<Vec, half>), nullptr)
constexpr WeightOnlyKernels kTable = {PER_FLOAT(rows),
                                      {panels<4, Vec>, panels<8, Vec>},
                                      prepared_bytes,
                                      prepare<Vec>,
                                      {columns<4, Vec>, columns<8, Vec>},
                                      {block<4, Vec>, block<8, Vec>},
                                      {transposed_block<4, Vec>, transposed_block<8, Vec>},
                                      PER_FLOAT(dequantize),
                                      PER_FLOAT(widen_numbers),
                                      PER_FLOAT(narrow_numbers)};
