// A GPU on one CPU thread, for the kernels of csrc/cuda: what device.cuh says in PTX, here in C++.
//
// A block, or a cluster of blocks, runs at a time; its threads are fibers that run until a barrier or an exchange makes
// them wait. Which one goes on first changes from launch to launch, so a missing barrier shows as a wrong number.
// Shared memory is NaN when a block starts, and its end is watched; an asynchronous copy arrives only when it is waited
// for; addresses must be aligned as the hardware wants them. A barrier that not all threads reach ends the process.
// Precision is the hardware's where it matters: fp32 sums of products of 16-bit numbers, one rounding at the end.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#define FASTLLM_EMULATED
#define DEVICE inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

namespace fastllm::emulator {

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "CUDA emulator: %s\n", what);
  abort();
}

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
};

union Lane {  // what one lane shows the others
  float number;
  struct {
    uint32_t a[4], b[2];
  } fragments;
  uint32_t address;
};
struct Warp {
  Barrier barrier;
  Lane lanes[2][32];  // two places in turn, as whoever overwrites one has passed the barrier after the reads of it
};
struct Coming {  // a tile, and the barrier at which it arrives
  uint32_t barrier;
  std::function<void()> bring;
};
struct Block {
  Barrier barrier, named[16];
  std::vector<Warp> warps;
  std::unique_ptr<char[]> memory;
  char* shared = nullptr;
  std::vector<Coming> coming;

  void deliver(uint32_t barrier) {
    std::vector<Coming> left;
    for (const Coming& tile : coming)
      if (tile.barrier == barrier)
        tile.bring();
      else
        left.push_back(tile);
    coming.swap(left);
  }
};

struct Copy {  // an asynchronous one, that has not arrived yet
  char* to;
  const void* from;
  int bytes;
  uint64_t group;
};

// A product of a warp group that has not been made yet, as one thread has it.
struct Product {
  float* sums;  // [N / 8][4]
  int N;
  const uint32_t* registers;  // a, or null
  uint64_t a, b;
  bool add, transposed;
  float (*number)(uint16_t);
  uint64_t group;
};

struct Fiber {
  jmp_buf here;
  int thread = 0, block_in_cluster = 0, turn = 0;
  Block* block = nullptr;
  std::function<bool()> may_go_on;  // or nothing, where it does not wait
  bool started = false, done = false;
  std::vector<Copy> copies;
  uint64_t group = 0;
  std::vector<Product> products;
  uint64_t product_group = 0;
  uint64_t phase_after[16] = {};  // the last phase of each named barrier that it has arrived in, plus 1
};

constexpr size_t kStackBytes = 64 << 10, kGuardBytes = 256;
constexpr char kCanary = 0x5a;

struct Machine {
  int arch = 90;
  uint64_t launches = 0, tiles = 0;
  // The launch that runs.
  int threads = 0, cluster = 1;
  int64_t first_block = 0;
  Barrier cluster_barrier;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  ucontext_t back;
  const std::function<void()>* kernel = nullptr;
  std::vector<char*> stacks;  // kept from launch to launch
};
inline Machine& machine() {
  static Machine one;
  return one;
}

inline int most_shared_bytes() {
  const int arch = machine().arch;
  return (arch >= 90 ? 227 : arch > 80 ? 99 : 163) << 10;
}

inline void wait_until(std::function<bool()> condition) {
  if (condition()) return;
  Machine& m = machine();
  Fiber* self = m.current;
  self->may_go_on = std::move(condition);
  if (!_setjmp(self->here)) _longjmp(m.scheduler, 1);
}
inline void arrive(Barrier& b) {
  if (++b.arrived < b.expected) return;
  b.arrived = 0;
  ++b.generation;
}
inline void wait(Barrier& b) {
  const uint64_t generation = b.generation;
  arrive(b);
  wait_until([&b, generation] { return b.generation != generation; });
}

inline void body() {
  Machine& m = machine();
  (*m.kernel)();
  m.current->done = true;
  _longjmp(m.scheduler, 1);
}

// Stacks are entered once by swapcontext; after that longjmp changes between them, which costs no system call.
inline void resume(size_t n) {
  Machine& m = machine();
  Fiber& f = m.fibers[n];
  m.current = &f;
  f.may_go_on = nullptr;
  if (_setjmp(m.scheduler)) return;
  if (f.started) _longjmp(f.here, 1);
  f.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = m.stacks[n];
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, body, 0);
  swapcontext(&m.back, &context);
}

inline void run(int64_t blocks, int threads, int shared_bytes, int cluster, const std::function<void()>& kernel) {
  Machine& m = machine();
  ++m.launches;
  if (threads % 32 || threads > 1024 || blocks % cluster || cluster > (m.arch >= 90 ? 8 : 1))
    fail("an impossible grid");
  if (shared_bytes > most_shared_bytes()) fail("too much shared memory");
  m.threads = threads, m.cluster = cluster, m.kernel = &kernel;
  while (m.stacks.size() < size_t(threads * cluster)) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for stacks");
    m.stacks.push_back((char*)stack);
  }
  for (m.first_block = 0; m.first_block < blocks; m.first_block += cluster) {
    m.cluster_barrier = {threads * cluster};
    m.blocks.clear();
    m.blocks.resize(cluster);
    m.fibers.clear();
    m.fibers.resize(size_t(threads) * cluster);
    for (int b = 0; b < cluster; ++b) {
      Block& block = m.blocks[b];
      block.barrier.expected = threads;
      block.warps.resize(threads / 32);
      for (Warp& warp : block.warps) warp.barrier.expected = 32;
      block.memory.reset(new char[shared_bytes + kGuardBytes + 1024]);
      block.shared = (char*)(((uintptr_t)block.memory.get() + 1023) / 1024 * 1024);
      memset(block.shared, 0xff, shared_bytes);  // NaN in every format
      memset(block.shared + shared_bytes, kCanary, kGuardBytes);
      for (int t = 0; t < threads; ++t) {
        Fiber& f = m.fibers[size_t(b) * threads + t];
        f.thread = t, f.block_in_cluster = b, f.block = &block;
      }
    }
    const size_t all = m.fibers.size();
    for (size_t done = 0, pass = m.launches; done < all; ++pass) {
      bool progress = false;
      done = 0;
      for (size_t k = 0; k < all; ++k) {
        const size_t n = pass % 2 ? k : all - 1 - k;
        Fiber& f = m.fibers[n];
        if (!f.done && (!f.may_go_on || f.may_go_on())) {
          resume(n);
          progress = true;
        }
        done += f.done;
      }
      if (!progress && done < all) fail("a barrier that not all threads reach");
    }
    for (const Block& block : m.blocks)
      for (size_t i = 0; i < kGuardBytes; ++i)
        if (block.shared[shared_bytes + i] != kCanary) fail("a write past the end of shared memory");
  }
}

inline Lane* exchange(const Lane& mine) {
  Fiber& f = *machine().current;
  Warp& warp = f.block->warps[f.thread / 32];
  Lane* lanes = warp.lanes[f.turn ^= 1];
  lanes[f.thread % 32] = mine;
  wait(warp.barrier);
  return lanes;
}
inline void need_aligned(const void* p) {
  if ((uintptr_t)p % 16) fail("an address that is not a multiple of 16");
}

struct Index {
  uint32_t x;
};

}  // namespace fastllm::emulator

// Which GPU it is: 80 and 86 have no clusters, 90 has; 86 has the least shared memory.
extern "C" __attribute__((weak, visibility("default"))) void fastllm_emulate(int arch) {
  fastllm::emulator::machine().arch = arch;
}
// How many tiles the hardware has fetched so far, which only Hopper's kernels let it do.
extern "C" __attribute__((weak, visibility("default"))) uint64_t fastllm_emulated_tiles() {
  return fastllm::emulator::machine().tiles;
}

#define threadIdx (fastllm::emulator::Index{uint32_t(fastllm::emulator::machine().current->thread)})
#define blockDim (fastllm::emulator::Index{uint32_t(fastllm::emulator::machine().threads)})
#define blockIdx             \
  (fastllm::emulator::Index{ \
      uint32_t(fastllm::emulator::machine().first_block + fastllm::emulator::machine().current->block_in_cluster)})

namespace fastllm::cuda {
namespace {

#include "cpu/float16.inl"

namespace emulator = fastllm::emulator;

inline void forget(uint32_t&) {}
inline void sync_block() { emulator::wait(emulator::machine().current->block->barrier); }
inline float shuffle_xor(float x, int lanes) {
  emulator::Lane mine;
  mine.number = x;
  return emulator::exchange(mine)[(emulator::machine().current->thread ^ lanes) % 32].number;
}
inline char* shared_memory();
inline float exp2_approximate(float x) { return x < -126 ? 0.0f : exp2f(x); }

template <class T>
uint32_t pack(float low, float high) {
  T a, b;
  narrow(low, a), narrow(high, b);
  return a.bits | uint32_t(b.bits) << 16;
}
template <class T>
float unpack(uint32_t both, int half) {
  return widen(T{uint16_t(half ? both >> 16 : both)});
}

inline void copy_async(uint32_t to, const void* from, int bytes) {
  emulator::need_aligned(from);
  emulator::need_aligned(shared_memory() + to);
  emulator::Fiber& f = *emulator::machine().current;
  f.copies.push_back({shared_memory() + to, from, bytes, f.group});
}
inline void close_copy_group() { ++emulator::machine().current->group; }
template <int kGroups>
void wait_for_copies() {
  emulator::Fiber& f = *emulator::machine().current;
  std::vector<emulator::Copy> left;
  for (const emulator::Copy& copy : f.copies)
    if (copy.group + kGroups < f.group) {
      memset(copy.to, 0, 16);
      memcpy(copy.to, copy.from, copy.bytes);
    } else {
      left.push_back(copy);
    }
  f.copies.swap(left);
}

inline void load_matrices(uint32_t (&x)[4], uint32_t row, bool transposed = false) {
  emulator::need_aligned(shared_memory() + row);
  emulator::Lane mine;
  mine.address = row;
  const emulator::Lane* lanes = emulator::exchange(mine);
  const int lane = emulator::machine().current->thread % 32;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t two[2];
    for (int e = 0; e < 2; ++e) {
      const int r = transposed ? lane % 4 * 2 + e : lane / 4, c = transposed ? lane / 4 : lane % 4 * 2 + e;
      two[e] = ((const uint16_t*)(shared_memory() + lanes[matrix * 8 + r].address))[c];
    }
    x[matrix] = two[0] | uint32_t(two[1]) << 16;
  }
}
inline void load_matrices_transposed(uint32_t (&x)[4], uint32_t row) { load_matrices(x, row, true); }

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Lane mine;
  for (int n = 0; n < 4; ++n) mine.fragments.a[n] = a[n];
  mine.fragments.b[0] = b0, mine.fragments.b[1] = b1;
  const emulator::Lane* lanes = emulator::exchange(mine);
  const int lane = emulator::machine().current->thread % 32, row = lane / 4, column = lane % 4 * 2;
  float left[2][16], right[2][16];  // two rows of a and two columns of b
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < 2; ++n) {
      const int half = k % 2, pair = k % 8 / 2, upper = k / 8;
      left[n][k] = unpack<T>(lanes[row * 4 + pair].fragments.a[upper * 2 + n], half);
      right[n][k] = unpack<T>(lanes[(column + n) * 4 + pair].fragments.b[upper], half);
    }
  for (int e = 0; e < 4; ++e)
    for (int k = 0; k < 16; ++k) c[e] += left[e / 2][k] * right[e % 2][k];
}

inline char* shared_memory() { return emulator::machine().current->block->shared; }

inline int cluster_size() { return emulator::machine().cluster; }
inline int cluster_rank() { return emulator::machine().current->block_in_cluster; }
inline void sync_cluster() { emulator::wait(emulator::machine().cluster_barrier); }
inline float from_cluster(const float* place, int rank) {
  const emulator::Machine& m = emulator::machine();
  return *(const float*)(m.blocks[rank].shared + ((const char*)place - m.current->block->shared));
}

inline bool has_clusters() { return emulator::machine().arch >= 90; }
inline int multiprocessors() { return 2; }
inline int most_shared_bytes() { return emulator::most_shared_bytes(); }

struct Grid {
  int64_t blocks;
  int threads, shared_bytes = 0, cluster = 1;
};
template <class Arguments>
const char* launch(void (*kernel)(Arguments), Grid grid, const Arguments& arguments, void*) {
  emulator::run(grid.blocks, grid.threads, grid.shared_bytes, grid.cluster, [&] { kernel(arguments); });
  return nullptr;
}

}  // namespace
}  // namespace fastllm::cuda

#include "cuda_emulator_hopper.h"
