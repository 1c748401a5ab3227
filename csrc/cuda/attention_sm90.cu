// Attention, forward, for Hopper: 16 bits, head sizes 64 and 128, causal, window, fewer key heads; what else there is
// of attention is attention.cu's.
//
// A block has 128 queries of one head. One thread brings keys and values to shared memory, tile after tile; two groups
// of four warps, with 64 queries each, multiply and take exponentials. In a group the scores of the next tile are made
// while the last one's probabilities meet its values; and the groups take turns, so that while one takes exponentials
// the matrix units work for the other.
// Source: Shah et al. 2024, arXiv:2407.08608 (FlashAttention-3).
#include "cuda/attention.cuh"
#include "cuda/hopper.cuh"

namespace fastllm::cuda {
namespace {

struct HopperAttention {
  TileMap q, k, v;
  Attention a;
};

// Where things lie in shared memory, in bytes. A tile has its columns in parts of 64, one after the other.
template <int kD, int kKeys>
struct Layout {
  static constexpr int kGroups = 2, kRows = 64, kQueries = kGroups * kRows, kStages = 2;
  static constexpr int kThreads = 128 * (1 + kGroups);
  static constexpr int kPartBytes = kKeys * 128, kTileBytes = kKeys * kD * 2, kQueryBytes = kQueries * kD * 2;
  static constexpr uint32_t kQ = 0, kK = kQueryBytes, kV = kK + kStages * kTileBytes;
  static constexpr uint32_t kQThere = kV + kStages * kTileBytes;
  static constexpr int kBytes = kQThere + (1 + 4 * kStages) * 8;
  static_assert(kQ % 1024 == 0 && kPartBytes % 1024 == 0, "a matrix begins at a multiple of 1024 bytes");

  DEVICE static uint32_t k(int tile) { return kK + tile % kStages * kTileBytes; }
  DEVICE static uint32_t v(int tile) { return kV + tile % kStages * kTileBytes; }
  // Barriers: the keys or values of a tile are there; those of the tile that was in their place have been read.
  DEVICE static uint32_t k_there(int tile) { return kQThere + 8 + tile % kStages * 8; }
  DEVICE static uint32_t v_there(int tile) { return k_there(tile) + kStages * 8; }
  DEVICE static uint32_t k_read(int tile) { return k_there(tile) + 2 * kStages * 8; }
  DEVICE static uint32_t v_read(int tile) { return k_there(tile) + 3 * kStages * 8; }
  DEVICE static int parity(int tile) { return tile / kStages % 2; }
};

// One thread: the queries, then keys and values, one tile of keys ahead of the values, as they are needed.
template <int kD, int kKeys>
DEVICE void bring_tiles(const HopperAttention& launch, Head at, int i_start, const Walk& walk) {
  using L = Layout<kD, kKeys>;
  const int h_kv = at.h / (launch.a.H / launch.a.Hkv);
  const auto bring = [](uint32_t to, int rows, const TileMap& map, int row, int h, int b, uint32_t there) {
    arrive_and_announce(there, rows * kD * 2);
    for (int part = 0; part < kD / 64; ++part) fetch_tile(to + part * rows * 128, map, part * 64, row, h, b, there);
  };
  if (walk.blocks) bring(L::kQ, L::kQueries, launch.q, i_start, at.h, at.b, L::kQThere);
  for (int n = 0; n <= walk.blocks; ++n) {
    if (n < walk.blocks) {
      wait_for_phase(L::k_read(n), L::parity(n) ^ 1);  // at once for the first tiles
      bring(L::k(n), kKeys, launch.k, walk.start + n * kKeys, h_kv, at.b, L::k_there(n));
    }
    if (n > 0) {
      wait_for_phase(L::v_read(n - 1), L::parity(n - 1) ^ 1);
      bring(L::v(n - 1), kKeys, launch.v, walk.start + (n - 1) * kKeys, h_kv, at.b, L::v_there(n - 1));
    }
  }
}

// A group of four warps: o and lse of its 64 queries from i on.
template <class T, int kD, int kKeys>
DEVICE void attend(const Attention& a, Head at, int group, int i, const Walk& walk) {
  using L = Layout<kD, kKeys>;
  const int row = int(threadIdx.x) % 128 / 32 * 16, lane = int(threadIdx.x) % 32;
  const Walk own = walk_keys<L::kRows, kKeys>(a, i);  // which tiles need no test is another question for 64 queries
  const float rate = a.scale * kLog2E;
  const uint64_t q = matrix_at(L::kQ + group * L::kRows * 128);
  float s[1][kKeys / 8][4] = {}, acc[1][kD / 8][4] = {}, m[2] = {kLowest, kLowest}, l[2] = {0, 0};
  uint32_t p[kKeys / 16][4];

  const auto multiply_keys = [&](int tile) {
    const uint64_t k = matrix_at(L::k(tile));
    open_products();
#pragma unroll
    for (int n = 0; n < kD / 16; ++n)
      multiply_by_transposed_async<T>(s[0], further(q, n / 4 * L::kQueries * 128 + n % 4 * 32),
                                      further(k, n / 4 * L::kPartBytes + n % 4 * 32), n > 0);
    close_products();
  };
  const auto multiply_values = [&](int tile) {
    const uint64_t v = matrix_at(L::v(tile), L::kPartBytes);
    open_products();
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) multiply_async<T>(acc[0], p[n], further(v, n * 16 * 128));
    close_products();
  };
  const auto wait_for_keys = [&](int tile) {
    if (tile < walk.blocks) wait_for_phase(L::k_there(tile), L::parity(tile));
  };
  const auto release = [&](uint32_t barrier) {
    if (lane == 0) arrive(barrier);
  };
  // s becomes exp2(rate s - m) with the new maximum m; what was summed up with the old one is to be multiplied by
  // shrink.
  const auto exponentials = [&](int tile, float (&shrink)[2]) {
    const int j = walk.start + tile * kKeys;
    if (own.needs_test(j, kKeys))
      for_elements(s, [&](float& x, int, int, int r, int c) {
        if (!sees(a, i + row + r, j + c)) x = -INFINITY;
      });
    float largest[2] = {-INFINITY, -INFINITY};
    for_elements(s, [&](float& x, int, int half, int, int) { largest[half] = fmaxf(largest[half], x); });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scaled = max_of_row(largest[r]) * rate, next = fmaxf(m[r], scaled);
      shrink[r] = exp2_approximate(m[r] - next);
      m[r] = next;
      l[r] *= shrink[r];
    }
    for_elements(s, [&](float& x, int, int half, int, int) {
      x = exp2_approximate(fmaf(x, rate, -m[half]));
      l[half] += x;
    });
  };
  const auto round_probabilities = [&] {
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float (&two)[4] = s[0][2 * n + e / 2];
        p[n][e] = pack<T>(two[e % 2 * 2], two[e % 2 * 2 + 1]);
      }
  };

  constexpr int kBothGroups = 2 * 128;
  const int turn = 1 + group, next_turn = 2 - group;
  if (walk.blocks) {
    if (group == 1) arrive_at<kBothGroups>(next_turn);  // offers the first turn; nobody may arrive twice in one phase
    float shrink[2];
    wait_for_phase(L::kQThere, 0);
    wait_for_keys(0);
    hold(s[0]);
    multiply_keys(0);
    wait_for_products<0>();
    hold(s[0]);
    release(L::k_read(0));
    exponentials(0, shrink);  // acc is 0, whatever it shrinks by
    round_probabilities();
    wait_for_keys(1);
    for (int n = 1; n < walk.blocks; ++n) {
      sync_at<kBothGroups>(turn);
      hold(s[0]);
      hold(acc[0]);
      multiply_keys(n);
      wait_for_phase(L::v_there(n - 1), L::parity(n - 1));
      multiply_values(n - 1);
      arrive_at<kBothGroups>(next_turn);
      wait_for_products<1>();
      hold(s[0]);
      release(L::k_read(n));
      exponentials(n, shrink);
      // Also keeps the wait below where it is: without a branch between them ptxas moves it above the exponentials.
      wait_for_keys(n + 1);
      wait_for_products<0>();
      hold(acc[0]);
      release(L::v_read(n - 1));
      for_elements(acc, [&](float& x, int, int half, int, int) { x *= shrink[half]; });
      round_probabilities();
    }
    if (group == 0) sync_at<kBothGroups>(turn);  // the other group's last offer
    hold(acc[0]);
    wait_for_phase(L::v_there(walk.blocks - 1), L::parity(walk.blocks - 1));
    multiply_values(walk.blocks - 1);
    wait_for_products<0>();
    hold(acc[0]);
  }

  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = sum_of_row(l[r]);
    const int query = i + row + r * 8 + lane / 4;
    inverse[r] = sum == 0 ? 0.0f : 1.0f / sum;
    if (query < a.T && lane % 4 == 0)
      a.lse[(int64_t(at.b) * a.H + at.h) * a.T + query] =
          sum == 0 ? -INFINITY : double(m[r]) * 0.6931471805599453 + double(logf(sum));
  }
  for_elements(acc, [&](float& x, int, int half, int, int) { x *= inverse[half]; });
  store_rows(acc, head_of<T>(a.o, at), a.o.t, i + row, a.T, kD, 1.0f);
}

template <class T, int kD, int kKeys>
__global__ void __launch_bounds__(kHopper ? Layout<kD, kKeys>::kThreads : kAbsentThreads, 1)
    attention_fwd_hopper_kernel(const __grid_constant__ HopperAttention launch) {
  if constexpr (kHopper) {
    using L = Layout<kD, kKeys>;
    const Attention& a = launch.a;
    const int blocks = (a.T + L::kQueries - 1) / L::kQueries, bh = int(blockIdx.x) / blocks;
    const Head at = {bh / a.H, bh % a.H};
    // Causal: those with most keys first.
    const int i_start = (blocks - 1 - int(blockIdx.x) % blocks) * L::kQueries;
    const Walk walk = walk_keys<L::kQueries, kKeys>(a, i_start);
    if (threadIdx.x == 0) {
      init_barrier(L::kQThere, 1);
      for (int n = 0; n < L::kStages; ++n) {
        init_barrier(L::k_there(n), 1);
        init_barrier(L::v_there(n), 1);
        init_barrier(L::k_read(n), 4 * L::kGroups);  // one lane of every warp
        init_barrier(L::v_read(n), 4 * L::kGroups);
      }
    }
    publish_barriers();
    // 128 * 24 + 256 * 240 registers are what 384 threads with 168 each have.
    const int group = warp_group() - 1;
    if (group < 0) {
      give_registers<24>();
      if (threadIdx.x == 0) bring_tiles<kD, kKeys>(launch, at, i_start, walk);
    } else {
      take_registers<240>();
      attend<T, kD, kKeys>(a, at, group, i_start + group * L::kRows, walk);
    }
  }
}

template <class T, int kD, int kKeys>
Error launch_hopper(Type type, const Attention& a, Stream stream) {
  using L = Layout<kD, kKeys>;
  HopperAttention arguments;
  arguments.a = a;
  Error error = make_map(arguments.q, type, a.q, a.B, a.H, a.T, kD, L::kQueries);
  if (!error) error = make_map(arguments.k, type, a.k, a.B, a.Hkv, a.S, kD, kKeys);
  if (!error) error = make_map(arguments.v, type, a.v, a.B, a.Hkv, a.S, kD, kKeys);
  if (error) return error;
  const int64_t blocks = (a.T + L::kQueries - 1) / L::kQueries * int64_t(a.B) * a.H;
  return launch(attention_fwd_hopper_kernel<T, kD, kKeys>, Grid{blocks, L::kThreads, L::kBytes}, arguments, stream);
}

template <class T>
Error attention_fwd_hopper_of(Type type, const Attention& a, Stream stream) {
  if (a.D == 64) return launch_hopper<T, 64, 128>(type, a, stream);
  // Where nothing is hidden larger tiles cost no more; with a diagonal they would be cut more often.
  const bool whole = a.first + a.T <= 1 && a.last >= a.S - 1;
  return whole ? launch_hopper<T, 128, 176>(type, a, stream) : launch_hopper<T, 128, 128>(type, a, stream);
}

// Tiles are fetched from rows at multiples of 16 bytes, and no two rows may be the same.
bool has_tiles(const Heads& x, int B, int H, int T) {
  const auto fits = [](int size, int64_t stride) { return size == 1 || (stride > 0 && stride % 8 == 0); };
  return fits(B, x.b) && fits(H, x.h) && fits(T, x.t) && aligned(x.data);
}

}  // namespace

bool takes_attention_fwd_hopper(const Attention& a) {
  return a.D == a.Dv && (a.D == 64 || a.D == 128) && a.S > 0 && a.scale > 0 && !is_scored(a) && !a.sink.data &&
         has_tiles(a.q, a.B, a.H, a.T) && has_tiles(a.k, a.B, a.Hkv, a.S) && has_tiles(a.v, a.B, a.Hkv, a.S) &&
         runs_on_hopper(attention_fwd_hopper_kernel<bf16, 64, 128>);
}

Error attention_fwd_hopper(Type type, const Attention& a, Stream stream) {
  return type == kBFloat16 ? attention_fwd_hopper_of<bf16>(type, a, stream)
                           : attention_fwd_hopper_of<half>(type, a, stream);
}

}  // namespace fastllm::cuda
