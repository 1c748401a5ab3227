// Attention, forward: o = softmax(scores) v for a block of queries of one head, walking over the keys that they see.
//
// Products by mma.sync, tiles by cp.async: while scores are made of one tile of keys, its values are on the way, and
// while those are used, the next keys. Source: Dao 2023, arXiv:2307.08691.
#include "cuda/attention.cuh"

namespace fastllm::cuda {
namespace {

template <int kD>
struct Forward {
  static constexpr int kM =
      kD == 64 ? 2 : 1;  // times 16 queries for a warp; with 2, what is loaded of a tile serves twice
  static constexpr int kQueries = 128, kKeys = 64;
  static constexpr int kThreads = kQueries / (16 * kM) * 32;
  static constexpr int kBytes = (kQueries + 2 * kKeys) * kD * 2;
};

template <class T, int kD, bool kScored>
__global__ void __launch_bounds__(Forward<kD>::kThreads, 1) attention_fwd_kernel(Attention a) {
  using F = Forward<kD>;
  constexpr int kM = F::kM, kN = F::kKeys / 8;
  const Tile<T, kD> q = {0}, k = {F::kQueries * q.kRowBytes}, v = {(F::kQueries + F::kKeys) * q.kRowBytes};
  const int blocks = (a.T + F::kQueries - 1) / F::kQueries, bh = int(blockIdx.x) / blocks;
  const Head at = {bh / a.H, bh % a.H}, at_kv = {at.b, at.h / (a.H / a.Hkv)};
  const int i_start = (blocks - 1 - int(blockIdx.x) % blocks) * F::kQueries;  // causal: those with most keys first
  const int row = int(threadIdx.x) / 32 * 16 * kM;
  const T *k_head = head_of<T>(a.k, at_kv), *v_head = head_of<T>(a.v, at_kv);
  const Walk walk = walk_keys<F::kQueries, F::kKeys>(a, i_start);
  const float slope = slope_of(a, at);

  float acc[kM][kD / 8][4] = {}, m[kM][2], l[kM][2];                           // l is this lane's part of the sum
  const float sink = a.sink.data ? number(a.sink, at.h) * kLog2E : -INFINITY;  // one more score, with no value
#pragma unroll
  for (int n = 0; n < 2 * kM; ++n) {
    m[n / 2][n % 2] = sink < kLowest ? kLowest : sink;
    l[n / 2][n % 2] = sink > kLowest && threadIdx.x % 4 == 0 ? 1.0f : 0.0f;
  }

  if (walk.blocks) {
    fetch<F::kQueries, F::kThreads>(q, head_of<T>(a.q, at), a.q.t, i_start, a.T, a.D);
    fetch<F::kKeys, F::kThreads>(k, k_head, a.k.t, walk.start, a.S, a.D);
    close_copy_group();
  }
  for (int n = 0; n < walk.blocks; ++n) {
    const int j_start = walk.start + n * F::kKeys;
    wait_for_copies<0>();
    sync_block();  // the keys are there, and nobody needs the values of the last tile any more
    fetch<F::kKeys, F::kThreads>(v, v_head, a.v.t, j_start, a.S, a.Dv);
    close_copy_group();
    float s[kM][kN][4] = {};
    multiply_by_transposed(s, q, row, k);
    wait_for_copies<0>();
    sync_block();  // the values are there, and nobody needs the keys any more
    if (n + 1 < walk.blocks) fetch<F::kKeys, F::kThreads>(k, k_head, a.k.t, j_start + F::kKeys, a.S, a.D);
    close_copy_group();

    float m_next[kM][2];
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r) m_next[r / 2][r % 2] = m[r / 2][r % 2];
    for_elements(s, [&](float& x, int, int, int r, int c) {
      float capped;
      x = score<kScored>(x, a, at, slope, i_start + row + r, j_start + c, &capped);
    });
    if (walk.needs_test(j_start, F::kKeys))
      for_elements(s, [&](float& x, int, int, int r, int c) {
        if (!sees(a, i_start + row + r, j_start + c)) x = -INFINITY;
      });
    for_elements(s, [&](float& x, int tile, int half, int, int) {
      m_next[tile][half] = m_next[tile][half] < x ? x : m_next[tile][half];
    });
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r) {
      float& largest = m_next[r / 2][r % 2];
      largest = max_of_row(largest);
      const float shrink = exp2_approximate(m[r / 2][r % 2] - largest);
      m[r / 2][r % 2] = largest;
      l[r / 2][r % 2] *= shrink;
#pragma unroll
      for (int d = 0; d < kD / 8; ++d) {
        acc[r / 2][d][r % 2 * 2] *= shrink;
        acc[r / 2][d][r % 2 * 2 + 1] *= shrink;
      }
    }
    for_elements(s, [&](float& x, int tile, int half, int, int) {
      x = exp2_approximate(x - m[tile][half]);
      l[tile][half] += x;
    });
    multiply(acc, s, v);
  }

#pragma unroll
  for (int r = 0; r < 2 * kM; ++r) {
    const float sum = sum_of_row(l[r / 2][r % 2]), inverse = sum == 0 ? 0.0f : 1.0f / sum;
    const int i = i_start + row + r / 2 * 16 + r % 2 * 8 + int(threadIdx.x) % 32 / 4;
    if (i < a.T && threadIdx.x % 4 == 0)
      a.lse[int64_t(bh) * a.T + i] =
          sum == 0 ? -INFINITY : double(m[r / 2][r % 2]) * 0.6931471805599453 + double(logf(sum));
#pragma unroll
    for (int d = 0; d < kD / 8; ++d) {
      acc[r / 2][d][r % 2 * 2] *= inverse;
      acc[r / 2][d][r % 2 * 2 + 1] *= inverse;
    }
  }
  store_rows(acc, head_of<T>(a.o, at), a.o.t, i_start + row, a.T, a.Dv, 1.0f);
}

template <class T, int kD, bool kScored>
Error launch_fwd(const Attention& a, Stream stream) {
  using F = Forward<kD>;
  const int64_t blocks = (a.T + F::kQueries - 1) / F::kQueries * int64_t(a.B) * a.H;
  return launch(attention_fwd_kernel<T, kD, kScored>, Grid{blocks, F::kThreads, F::kBytes}, a, stream);
}
template <class T>
Error attention_fwd_of(const Attention& a, Stream stream) {
  if ((a.D > a.Dv ? a.D : a.Dv) <= 64)
    return is_scored(a) ? launch_fwd<T, 64, true>(a, stream) : launch_fwd<T, 64, false>(a, stream);
  return is_scored(a) ? launch_fwd<T, 128, true>(a, stream) : launch_fwd<T, 128, false>(a, stream);
}

}  // namespace

Error attention_fwd(Type type, const Attention& a, Stream stream) {
  if (takes_attention_fwd_hopper(a)) return attention_fwd_hopper(type, a, stream);
  return type == kBFloat16 ? attention_fwd_of<bf16>(a, stream) : attention_fwd_of<half>(a, stream);
}

}  // namespace fastllm::cuda
