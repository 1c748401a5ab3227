// What both passes of attention share: tiles in shared memory and their products, which keys a query sees, and scores.
#pragma once
#include "cuda/pack.cuh"

namespace fastllm::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
// Where a running maximum starts. Finite: exp2(-inf - kLowest) is 0, but exp2(-inf - -inf) would be NaN.
constexpr float kLowest = -3.0e38f;

// Rows of kD 16-bit numbers in shared memory. The chunks of 16 bytes of a row are permuted, so that eight rows of one
// column of chunks lie in different banks: neither copies nor ldmatrix wait for each other.
template <class T, int kD>
struct Tile {
  uint32_t at;  // in bytes

  static constexpr int kRowBytes = kD * int(sizeof(T));
  DEVICE uint32_t chunk(int row, int column) const { return at + row * kRowBytes + (column ^ (row & 7)) * 16; }
  // What this lane addresses of the 16 rows from `row` on and 16 columns, `row` a multiple of 16: chunk(row + lane %
  // 16, 2 * columns + lane / 16), written so that all tiles share the part that depends on the lane.
  DEVICE uint32_t corner(int row, int columns) const {
    const int lane = int(threadIdx.x) % 32;
    return at + row * kRowBytes + (lane % 16 * kRowBytes + ((columns * 2) ^ (lane / 16 ^ lane % 8)) * 16);
  }
};

// Begins to copy the rows start, start + 1, ... of one head to a tile: zero from row `stop` and from column D on.
template <int kRows, int kThreads, class T, int kD>
DEVICE void fetch(Tile<T, kD> tile, const T* head, int64_t stride, int start, int stop, int D) {
  constexpr int kChunks = kD / 8, kStep = kThreads / kChunks;
  static_assert(kStep % 8 == 0 && kRows % kStep == 0, "the chunks of a thread must be permuted alike");
  const int row = int(threadIdx.x) / kChunks, column = int(threadIdx.x) % kChunks;
  const int rows = column * 8 < D ? stop - start - row : 0;
  const T* from = head + (start + row) * stride + column * 8;
  const uint32_t to = tile.chunk(row, column);
#pragma unroll
  for (int n = 0; n < kRows; n += kStep) {
    copy_async(to + n * tile.kRowBytes, n < rows ? from : head, n < rows ? 16 : 0);
    from += kStep * stride;
  }
}

// c += a b^T: 16 * kM rows of tile a from `row` on, by all 8 * kN rows of tile b; one warp.
template <class T, int kD, int kM, int kN>
DEVICE void multiply_by_transposed(float (&c)[kM][kN][4], Tile<T, kD> a, int row, Tile<T, kD> b) {
#pragma unroll 4  // not all of it: what the later steps load would take registers early
  for (int k = 0; k < kD / 16; ++k) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) load_matrices(left[m], a.corner(row + m * 16, k));
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t right[4];
      load_matrices(right, b.corner(n * 8, k));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply_add<T>(c[m][n], left[m], right[0], right[2]);
        multiply_add<T>(c[m][n + 1], left[m], right[1], right[3]);
      }
    }
  }
}

// c += a b, a in the registers where multiply_by_transposed left it, rounded to T; b a tile of 8 * kN rows.
template <class T, int kD, int kM, int kN>
DEVICE void multiply(float (&c)[kM][kD / 8][4], const float (&a)[kM][kN][4], Tile<T, kD> b) {
#pragma unroll
  for (int k = 0; k < kN; k += 2) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      left[m][0] = pack<T>(a[m][k][0], a[m][k][1]);
      left[m][1] = pack<T>(a[m][k][2], a[m][k][3]);
      left[m][2] = pack<T>(a[m][k + 1][0], a[m][k + 1][1]);
      left[m][3] = pack<T>(a[m][k + 1][2], a[m][k + 1][3]);
    }
#pragma unroll
    for (int d = 0; d < kD / 8; d += 2) {
      uint32_t right[4];
      load_matrices_transposed(right, b.corner(k * 8, d / 2));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply_add<T>(c[m][d], left[m], right[0], right[1]);
        multiply_add<T>(c[m][d + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// f(x, m, half, row, column) for the elements x that this lane has of a product; its rows are numbered by (m, half).
template <int kM, int kN, class F>
DEVICE void for_elements(float (&c)[kM][kN][4], F f) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) f(c[m][n][e], m, e / 2, m * 16 + e / 2 * 8 + lane / 4, n * 8 + lane % 4 * 2 + e % 2);
}

// Over the four lanes that have a row of a product.
DEVICE float sum_of_row(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
DEVICE float max_of_row(float x) {
  const float other = shuffle_xor(x, 1), both = x < other ? other : x, far = shuffle_xor(both, 2);
  return both < far ? far : both;
}

// A warp's rows of a product, times `factor`, to the rows i, i + 1, ... of one head, as far as they exist.
template <class T, int kM, int kN>
DEVICE void store_rows(const float (&c)[kM][kN][4], T* head, int64_t stride, int i, int stop, int D, float factor) {
  const int lane = int(threadIdx.x) % 32, first = lane % 4 * 2;
  const bool pairs = (D | stride) % 2 == 0 && uint64_t(head) % 4 == 0;
#pragma unroll
  for (int r = 0; r < 2 * kM; ++r) {
    const int row = i + r * 8 + lane / 4, columns = row < stop ? D - first : 0;
    T* const to = head + row * stride + first;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float low = c[r / 2][n][r % 2 * 2] * factor, high = c[r / 2][n][r % 2 * 2 + 1] * factor;
      if (n * 8 < columns) {
        if (pairs)
          *(uint32_t*)(to + n * 8) = pack<T>(low, high);
        else
          narrow(low, to[n * 8]);
      }
      if (!pairs && n * 8 + 1 < columns) narrow(high, to[n * 8 + 1]);
    }
  }
}

// Blocks of `kBlock` from `start` on; those from `whole` to `whole_end` see and are seen by all, and need no test.
struct Walk {
  int start, blocks, whole, whole_end;

  template <int kBlock>
  DEVICE static Walk over(int low, int high, int whole_low, int whole_high) {
    const int start = (low > 0 ? low : 0) / kBlock * kBlock;
    return {start, high > start ? (high - start + kBlock - 1) / kBlock : 0, whole_low, whole_high};
  }
  DEVICE bool needs_test(int at, int block) const { return at < whole || at + block > whole_end; }
};
DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// The keys that the queries i, i + 1, ... of a block see.
template <int kQueries, int kKeys>
DEVICE Walk walk_keys(const Attention& a, int i) {
  const int i_last = smaller(i + kQueries, a.T) - 1;
  return Walk::over<kKeys>(i + a.first, smaller(i_last + a.last + 1, a.S), i_last + a.first,
                           smaller(i + a.last + 1, a.S));
}
// The queries that see the keys j, j + 1, ... of a block: j is seen by j - last to j - first.
template <int kKeys, int kQueries>
DEVICE Walk walk_queries(const Attention& a, int j) {
  const int j_last = smaller(j + kKeys, a.S) - 1;
  return Walk::over<kQueries>(j - a.last, smaller(j_last - a.first + 1, a.T), j_last - a.last,
                              smaller(j - a.first + 1, a.T));
}

struct Head {
  int b, h;
};
template <class T>
DEVICE T* head_of(const Heads& x, Head at) {
  return (T*)x.data + at.b * x.b + at.h * x.h;
}

DEVICE int64_t place(const Pairs& x, Head at, int i, int j) { return at.b * x.b + at.h * x.h + i * x.t + j * x.s; }

// log2(e) times the score of query i and key j, from their product, and the tanh of the soft-cap, which its gradient
// needs. kScored = false: there is nothing but the scale.
template <bool kScored>
DEVICE float score(float qk, const Attention& a, Head at, float slope, int i, int j, float* capped) {
  if constexpr (!kScored) return qk * (a.scale * kLog2E);
  float s = qk * (a.scale * kLog2E);
  if (a.softcap != 0) {
    *capped = tanhf(qk * (a.scale / a.softcap));
    s = *capped * (a.softcap * kLog2E);
  }
  if (i >= a.T || j >= a.S) return -INFINITY;
  if (a.bias.data) s += number({a.bias.data, a.bias.type}, place(a.bias, at, i, j)) * kLog2E;
  if (a.slopes.data) s -= slope * fabsf(float(i + a.q_offset - j));
  if (a.mask.data && !((const uint8_t*)a.mask.data)[place(a.mask, at, i, j)]) s = -INFINITY;
  return s;
}
DEVICE float slope_of(const Attention& a, Head at) {
  return a.slopes.data ? number(a.slopes, (a.slopes_per_batch ? at.b * a.H : 0) + at.h) * kLog2E : 0.0f;
}
DEVICE bool sees(const Attention& a, int i, int j) { return j < a.S && j >= i + a.first && j <= i + a.last; }

inline bool is_scored(const Attention& a) { return a.softcap != 0 || a.mask.data || a.bias.data || a.slopes.data; }

}  // namespace
}  // namespace fastllm::cuda
