// What csrc/cuda/hopper.cuh says in PTX, for the emulator (cuda_emulator.h includes this), as the PTX ISA describes it.
//
// Tiles and products are asynchronous. In every other launch products happen when they are begun and tiles as late as
// they may, when somebody waits for them; then it is the other way round. So both show as wrong numbers: what is read
// before it was waited for, and what is written while it may still be read. Matrices in shared memory are read by what
// their descriptor says and by nothing else.
#pragma once

namespace fastllm::emulator {

// A barrier in shared memory.
struct PhaseBarrier {
  int16_t expected, pending;
  int32_t bytes : 31;
  uint32_t phase : 1;

  void turn() {
    if (pending < 0) fail("more arrivals than a barrier expects");
    if (pending || bytes) return;
    pending = expected;
    phase ^= 1;
  }
};
static_assert(sizeof(PhaseBarrier) == 8, "");

inline char* shared() { return machine().current->block->shared; }
inline bool are_tiles_late() { return machine().launches % 2; }

struct Map {  // of a [B, H, T, D] tensor of 16-bit numbers, and the rows of a tile of 64 columns
  const uint16_t* data;
  int64_t size[4], stride[4];
  int rows;
};

inline PhaseBarrier& phase_barrier(char* memory, uint32_t at) {
  if (at % 8) fail("a barrier that is not at a multiple of 8");
  return *(PhaseBarrier*)(memory + at);
}

// Chunks of 16 bytes are permuted: bits 4 to 6 of an address are those of the chunk, exclusive or bits 7 to 9.
inline uint32_t permuted(uint32_t at) { return at ^ (at >> 7 & 7) << 4; }

inline void arrive_tile(char* memory, uint32_t to, const Map& map, int column, int row, int head, int batch,
                        uint32_t barrier) {
  const int64_t start[4] = {batch, head, row, column};
  for (int r = 0; r < map.rows; ++r)
    for (int c = 0; c < 64; ++c) {
      const int64_t index[4] = {start[0], start[1], start[2] + r, start[3] + c};
      int64_t place = 0;
      bool inside = true;
      for (int n = 0; n < 4; ++n) {
        inside = inside && index[n] >= 0 && index[n] < map.size[n];
        place += index[n] * map.stride[n];
      }
      *(uint16_t*)(memory + permuted(to + r * 128 + c * 2)) = inside ? map.data[place] : 0;
    }
  PhaseBarrier& b = phase_barrier(memory, barrier);
  b.bytes -= map.rows * 128;
  b.turn();
}

inline uint16_t element(uint64_t matrix, bool rows_along_n, int n, int k) {
  if (matrix >> 62 != 1 || (matrix >> 49 & 7)) fail("a matrix that is not in rows of 128 bytes with permuted chunks");
  const uint32_t start = uint32_t(matrix & 0x3fff) * 16;
  const uint32_t leading = uint32_t(matrix >> 16 & 0x3fff) * 16, stride = uint32_t(matrix >> 32 & 0x3fff) * 16;
  const uint32_t at = rows_along_n ? start + n / 64 * leading + n % 64 * 2 + k / 8 * stride + k % 8 * 128
                                   : start + n / 8 * stride + n % 8 * 128 + k * 2;
  return *(const uint16_t*)(shared() + permuted(at));
}

inline void make(const Product& p) {
  const int thread = machine().current->thread, warp = thread % 128 / 32, lane = thread % 32;
  float left[2][16];
  if (p.registers) {
    Lane mine;
    for (int n = 0; n < 4; ++n) mine.fragments.a[n] = p.registers[n];
    const Lane* lanes = exchange(mine);
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 16; ++k) {
        const uint32_t both = lanes[lane / 4 * 4 + k % 8 / 2].fragments.a[k / 8 * 2 + half];
        left[half][k] = p.number(uint16_t(k % 2 ? both >> 16 : both));
      }
  } else {
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 16; ++k) left[half][k] = p.number(element(p.a, false, warp * 16 + half * 8 + lane / 4, k));
  }
  for (int n = 0; n < p.N / 8; ++n)
    for (int e = 0; e < 2; ++e) {
      float right[16];
      for (int k = 0; k < 16; ++k) right[k] = p.number(element(p.b, p.transposed, n * 8 + lane % 4 * 2 + e, k));
      for (int half = 0; half < 2; ++half) {
        float& c = p.sums[n * 4 + half * 2 + e];
        if (!p.add) c = 0;
        for (int k = 0; k < 16; ++k) c += left[half][k] * right[k];
      }
    }
}

inline void begin(Product p) {
  Fiber& f = *machine().current;
  p.group = f.product_group;
  if (are_tiles_late())
    make(p);
  else
    f.products.push_back(p);
}

}  // namespace fastllm::emulator

namespace fastllm::cuda {
namespace {

inline uint32_t shared_address(uint32_t at) { return at; }

constexpr bool kHopper = true;
constexpr int kAbsentThreads = 32;

inline int warp_group() { return emulator::machine().current->thread / 128; }
template <int>
void give_registers() {}
template <int>
void take_registers() {}

template <int kThreads>
emulator::Barrier& named_barrier(int number) {
  emulator::Fiber& f = *emulator::machine().current;
  emulator::Barrier& b = f.block->named[number];
  b.expected = kThreads;
  if (f.phase_after[number] == b.generation + 1) emulator::fail("a thread arrives twice in one phase of a barrier");
  f.phase_after[number] = b.generation + 1;
  return b;
}
template <int kThreads>
void sync_at(int number) {
  emulator::wait(named_barrier<kThreads>(number));
}
template <int kThreads>
void arrive_at(int number) {
  emulator::arrive(named_barrier<kThreads>(number));
}

inline void init_barrier(uint32_t at, int arrivals) {
  emulator::phase_barrier(shared_memory(), at) = {int16_t(arrivals), int16_t(arrivals), 0, 0};
}
inline void publish_barriers() { sync_block(); }
inline void arrive(uint32_t at) {
  emulator::PhaseBarrier& b = emulator::phase_barrier(shared_memory(), at);
  --b.pending;
  b.turn();
}
inline void arrive_and_announce(uint32_t at, int bytes) {
  emulator::PhaseBarrier& b = emulator::phase_barrier(shared_memory(), at);
  b.bytes += bytes;
  arrive(at);
}
inline void wait_for_phase(uint32_t at, int parity) {
  emulator::Block* block = emulator::machine().current->block;
  emulator::wait_until([=] {
    emulator::PhaseBarrier& b = emulator::phase_barrier(block->shared, at);
    if (b.phase == uint32_t(parity)) block->deliver(at);
    return b.phase != uint32_t(parity);
  });
}

using TileMap = emulator::Map;
inline void fetch_tile(uint32_t to, const TileMap& map, int column, int row, int head, int batch, uint32_t barrier) {
  if (to % 128) emulator::fail("a tile that is not at a multiple of 128");
  emulator::Block* block = emulator::machine().current->block;
  ++emulator::machine().tiles;
  const auto bring = [=] { emulator::arrive_tile(block->shared, to, map, column, row, head, batch, barrier); };
  if (emulator::are_tiles_late())
    block->coming.push_back({barrier, bring});
  else
    bring();
}

template <int kN>
void hold(float (&)[kN][4]) {}
inline void open_products() {}
inline void close_products() { ++emulator::machine().current->product_group; }
template <int kGroups>
void wait_for_products() {
  emulator::Fiber& f = *emulator::machine().current;
  std::vector<emulator::Product> left;
  for (const emulator::Product& p : f.products)
    if (p.group + kGroups < f.product_group)
      emulator::make(p);
    else
      left.push_back(p);
  f.products.swap(left);
  emulator::wait(f.block->warps[f.thread / 32].barrier);  // a warp waits as a whole: then one lane may speak for it
}

template <class T>
float number_of(uint16_t bits) {
  return widen(T{bits});
}
template <class T, int kN>
void multiply_by_transposed_async(float (&c)[kN][4], uint64_t a, uint64_t b, bool add) {
  emulator::begin({c[0], kN * 8, nullptr, a, b, add, false, number_of<T>});
}
template <class T, int kN>
void multiply_async(float (&c)[kN][4], const uint32_t (&a)[4], uint64_t b) {
  emulator::begin({c[0], kN * 8, a, 0, b, true, true, number_of<T>});
}

template <class Kernel>
bool runs_on_hopper(Kernel) {
  return emulator::machine().arch == 90;
}

template <class Heads>
const char* make_map(TileMap& map, int, const Heads& x, int B, int H, int T, int D, int rows) {
  if (D % 64 || rows > 256) emulator::fail("a tile that the hardware does not know");
  emulator::need_aligned(x.data);
  map = {(const uint16_t*)x.data, {B, H, T, D}, {x.b, x.h, x.t, 1}, rows};
  for (int n = 0; n < 3; ++n)
    if (map.size[n] > 1 && (map.stride[n] % 8 || map.stride[n] <= 0)) emulator::fail("strides that no map can have");
  return nullptr;
}

}  // namespace
}  // namespace fastllm::cuda
