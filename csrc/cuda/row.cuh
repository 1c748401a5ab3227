// Kernels that work on rows: who shares a row, how its numbers are loaded, and sums over it.
#pragma once
#include "cuda/pack.cuh"

namespace fastllm::cuda {
namespace {

constexpr int kPacks = 4;       // of up to 16 bytes of a row, which a thread keeps in registers
constexpr int kMostBlocks = 8;  // that share a row: the largest cluster that every sm_90 takes

// How a row is cut up: `threads` neighbouring threads of a block, a power of two, have it together with as many of each
// of the other blocks of the cluster. Several rows are in a block where they are short.
struct Share {
  int threads, rows, blocks;
};

// The threads of a row. Every thread of a block must make the same calls of reduce().
class Team {
 public:
  DEVICE explicit Team(int threads) : threads_(threads) {}
  DEVICE int row() const { return int(threadIdx.x) / threads_; }  // in the block
  DEVICE int rank() const { return cluster_rank() * threads_ + int(threadIdx.x) % threads_; }
  DEVICE int size() const { return cluster_size() * threads_; }

  // combine()s v over all threads of the team; all get the same bits. scratch() must be in shared memory.
  template <int kValues, class Combine>
  DEVICE void reduce(float (&v)[kValues], Combine combine) {
    butterfly(v, threads_ < 32 ? threads_ : 32, combine);
    const int warps = threads_ / 32;
    if (warps > 1) {
      float* mine = scratch<kValues>(0);
      if (threadIdx.x % 32 == 0)
        for (int n = 0; n < kValues; ++n) mine[threadIdx.x / 32 * kValues + n] = v[n];
      sync_block();
      const int first = row() * warps;
      for (int n = 0; n < kValues; ++n) v[n] = mine[(first + threadIdx.x % warps) * kValues + n];
      butterfly(v, warps, combine);
    }
    if (cluster_size() > 1) {
      float* mine = scratch<kValues>(1);
      if (threadIdx.x == 0)
        for (int n = 0; n < kValues; ++n) mine[n] = v[n];
      sync_cluster();
      for (int n = 0; n < kValues; ++n) {
        float all = from_cluster(mine + n, 0);
        for (int rank = 1; rank < cluster_size(); ++rank) all = combine(all, from_cluster(mine + n, rank));
        v[n] = all;
      }
    }
    turn_ ^= 1;
  }

  // No block may end while another still reads its shared memory.
  DEVICE void leave() {
    if (cluster_size() > 1) sync_cluster();
  }

 private:
  template <int kValues, class Combine>
  DEVICE void butterfly(float (&v)[kValues], int lanes, Combine combine) {
    for (int distance = lanes / 2; distance; distance /= 2)
      for (int n = 0; n < kValues; ++n) v[n] = combine(v[n], shuffle_xor(v[n], distance));
  }
  // Two places take turns: whoever writes one again has passed the barrier after the reads of it. So one barrier a
  // reduction is enough.
  template <int kValues>
  DEVICE float* scratch(int level) {
    static_assert(kValues <= 2, "");
    return (float*)shared_memory() + (level * 2 + turn_) * 64;
  }

  int threads_, turn_ = 0;
};
constexpr int kScratchBytes = 4 * 64 * sizeof(float);  // what Team takes at the start of the shared memory

struct Sum {
  DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Max {
  DEVICE float operator()(float a, float b) const { return a < b ? b : a; }  // keeps a where b is NaN
};

// Between two passes over kept packs: 16-bit numbers are widened twice, or both forms would be in registers.
template <class T, int V, int kN>
DEVICE void forget_widened(Pack<T, V> (&kept)[kN]) {
  if constexpr (sizeof(T) == 2 && V > 1) {
#pragma unroll
    for (int pack = 0; pack < kN; ++pack)
#pragma unroll
      for (int n = 0; n < V / 2; ++n) forget(((uint32_t*)&kept[pack])[n]);
  }
}

// f(pack, first column) for the columns of a row that this thread has: kPacks of them in registers, or any number.
template <bool kOnChip, int V, class F>
DEVICE void for_packs(const Team& team, int64_t D, F f) {
  if constexpr (kOnChip) {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      const int i = (pack * team.size() + team.rank()) * V;
      if (i < D) f(pack, i);
    }
  } else {
    for (int64_t i = int64_t(team.rank()) * V; i < D; i += int64_t(team.size()) * V) f(0, i);
  }
}

inline int64_t up_to_power_of_two(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

// Short rows: one pack a thread, up to a warp; then up to kPacks a thread. `most` is how many threads a block may have.
// blocks = 0: the row does not fit on chip, `most` threads walk over it.
inline Share share(int64_t D, int V, int most, bool clusters) {
  const int64_t packs = (D + V - 1) / V;
  const int64_t threads = up_to_power_of_two(packs <= 32           ? packs
                                             : packs > 32 * kPacks ? (packs + kPacks - 1) / kPacks
                                                                   : 32);
  if (threads > most) {
    const int64_t blocks = up_to_power_of_two((threads + most - 1) / most);
    return {most, 1, clusters && blocks <= kMostBlocks ? int(blocks) : 0};
  }
  constexpr int kSmallestBlock = 128;
  return {int(threads), threads < kSmallestBlock ? int(kSmallestBlock / threads) : 1, 1};
}

}  // namespace
}  // namespace fastllm::cuda
