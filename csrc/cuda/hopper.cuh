// What Hopper (sm_90a) adds for warps with different work: barriers in shared memory, tiles that come by themselves
// (TMA), products of four warps that go on while these do something else (wgmma), registers that change hands.
//
// As in device.cuh, PTX stands here and nowhere else, and the emulator of a GPU has the same names.
#pragma once
#include "cuda/device.cuh"
#include "cuda/kernels.h"

#ifndef FASTLLM_EMULATED
#include <cuda.h>

namespace fastllm::cuda {
namespace {

// Whether what is compiled now may use all this; elsewhere such a kernel is empty, and says so by its launch bounds.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHopper = false;
#else
constexpr bool kHopper = true;
#endif

// Four warps, which multiply together; alike for all threads of a warp, and the compiler knows it.
DEVICE int warp_group() { return __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0); }

// The threads of a warp group give registers back, or take more: kCount each, of which both kinds must have enough.
template <int kCount>
DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Barrier `number` (1 to 15) of kThreads, of which some may arrive without waiting for the others.
template <int kThreads>
DEVICE void sync_at(int number) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(kThreads) : "memory");
}
template <int kThreads>
DEVICE void arrive_at(int number) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "n"(kThreads) : "memory");
}

// Barriers in shared memory, of 8 bytes. A phase of one ends when so many threads have arrived, and all bytes that were
// announced; then the next begins. wait_for_phase waits for the end of a phase of parity 0 or 1: the first has 0.
DEVICE void init_barrier(uint32_t at, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(arrivals) : "memory");
}
DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  sync_block();
}
DEVICE void arrive(uint32_t at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(at)) : "memory");
}
DEVICE void arrive_and_announce(uint32_t at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(at)), "r"(bytes)
               : "memory");
}
DEVICE void wait_for_phase(uint32_t at, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@ended bra there;\n"  // not .uni: the lanes of a warp may see the end of a phase at different times
      "bra again;\n"
      "there:\n"
      "}" ::"r"(shared_address(at)),
      "r"(parity)
      : "memory");
}

// A [B, H, T, D] tensor as the hardware that fetches tiles of it knows it.
using TileMap = CUtensorMap;

// Begins to fetch the tile of the map from (batch, head, row, column) on; what lies outside the tensor becomes 0. Its
// rows of 128 bytes lie one after the other, the chunks of 16 bytes permuted: number c of row r is where c ^ r % 8 was.
DEVICE void fetch_tile(uint32_t to, const TileMap& map, int column, int row, int head, int batch, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(shared_address(barrier))
      : "memory");
}

// x, which a product has written or will read, is in its registers here, and not before or after.
template <int kN>
DEVICE void hold(float (&x)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN * 4; ++n) asm volatile("" : "+f"(x[n / 4][n % 4])::"memory");
}

// Products are opened, made and closed as a group; of those that were closed last kGroups may be under way after the
// wait. Before it nobody may touch their registers.
DEVICE void open_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kGroups>
DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

#define FASTLLM_REGISTERS_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTLLM_REGISTERS_1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTLLM_REGISTERS_2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTLLM_REGISTERS_3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTLLM_REGISTERS_4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define FASTLLM_REGISTERS_5 "%80, %81, %82, %83, %84, %85, %86, %87"
#define FASTLLM_REGISTERS_OF_64 FASTLLM_REGISTERS_0 ", " FASTLLM_REGISTERS_1
#define FASTLLM_REGISTERS_OF_128 FASTLLM_REGISTERS_OF_64 ", " FASTLLM_REGISTERS_2 ", " FASTLLM_REGISTERS_3
#define FASTLLM_REGISTERS_OF_176 FASTLLM_REGISTERS_OF_128 ", " FASTLLM_REGISTERS_4 ", " FASTLLM_REGISTERS_5
#define FASTLLM_SUMS(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define FASTLLM_SUMS_4(n) FASTLLM_SUMS(n), FASTLLM_SUMS(n + 1), FASTLLM_SUMS(n + 2), FASTLLM_SUMS(n + 3)
#define FASTLLM_SUMS_OF_64 FASTLLM_SUMS_4(0), FASTLLM_SUMS_4(4)
#define FASTLLM_SUMS_OF_128 FASTLLM_SUMS_OF_64, FASTLLM_SUMS_4(8), FASTLLM_SUMS_4(12)
#define FASTLLM_SUMS_OF_176 FASTLLM_SUMS_OF_128, FASTLLM_SUMS_4(16), FASTLLM_SUMS(20), FASTLLM_SUMS(21)

#define FASTLLM_WGMMA(N, TYPES, A, B, ADD, ORDER, ...)                                               \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD                                           \
               ", 0;\n"                                                                              \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES " {" FASTLLM_REGISTERS_OF_##N \
               "}, " A ", " B ", add, 1, 1, " ORDER ";\n}"                                           \
               : FASTLLM_SUMS_OF_##N                                                                 \
               : __VA_ARGS__)

// c = a b^T, or c += a b^T: a [64, 16] and b [N, 16] in shared memory (matrix_at), c [64, N] over the threads of a warp
// group: every warp has 16 rows, and these as multiply_add has them.
#define FASTLLM_MULTIPLY_BY_TRANSPOSED(N, A, B, ADD)                                                 \
  template <class T>                                                                                 \
  DEVICE void multiply_by_transposed_async(float (&c)[N / 8][4], uint64_t a, uint64_t b, bool add) { \
    if constexpr (is_bf16<T>)                                                                        \
      FASTLLM_WGMMA(N, "bf16.bf16", A, B, ADD, "0, 0", "l"(a), "l"(b), "r"(int(add)));               \
    else                                                                                             \
      FASTLLM_WGMMA(N, "f16.f16", A, B, ADD, "0, 0", "l"(a), "l"(b), "r"(int(add)));                 \
  }
FASTLLM_MULTIPLY_BY_TRANSPOSED(128, "%64", "%65", "%66")
FASTLLM_MULTIPLY_BY_TRANSPOSED(176, "%88", "%89", "%90")

// c += a b: a [64, 16] in registers, of each warp as multiply_add has it, b [16, N] in shared memory.
#define FASTLLM_MULTIPLY(N, A, B, ADD)                                                                           \
  template <class T>                                                                                             \
  DEVICE void multiply_async(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b) {                         \
    if constexpr (is_bf16<T>)                                                                                    \
      FASTLLM_WGMMA(N, "bf16.bf16", A, B, ADD, "1", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1)); \
    else                                                                                                         \
      FASTLLM_WGMMA(N, "f16.f16", A, B, ADD, "1", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));   \
  }
FASTLLM_MULTIPLY(64, "{%32, %33, %34, %35}", "%36", "%37")
FASTLLM_MULTIPLY(128, "{%64, %65, %66, %67}", "%68", "%69")

// Whether the code of this kernel that the current device runs is Hopper's and not empty.
template <class Kernel>
bool runs_on_hopper(Kernel kernel) {
  static const bool found = is_present(kernel);
  return found;
}

// The map of x, of whose heads a tile has `rows` rows and 64 columns. D is a multiple of 64.
inline Error make_map(TileMap& map, Type type, const Heads& x, int B, int H, int T, int D, int rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  // From the driver that is there: linked to it, the library could not be loaded without one.
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
    return status == cudaDriverEntryPointSuccess ? Encode(found) : Encode(nullptr);
  }();
  if (!encode) return "the CUDA driver has no cuTensorMapEncodeTiled";
  const cuuint64_t shape[4] = {cuuint64_t(D), cuuint64_t(T), cuuint64_t(H), cuuint64_t(B)};
  // The stride of a dimension of size 1 may be anything, but not for the hardware.
  const auto bytes = [D](int size, int64_t stride) { return cuuint64_t(size > 1 ? stride : D) * 2; };
  const cuuint64_t strides[3] = {bytes(T, x.t), bytes(H, x.h), bytes(B, x.b)};
  const cuuint32_t tile[4] = {64, cuuint32_t(rows), 1, 1}, every[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, type == kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, x.data,
             shape, strides, tile, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled does not take this tensor";
}

}  // namespace
}  // namespace fastllm::cuda
#endif

namespace fastllm::cuda {
namespace {

// A matrix in shared memory, in rows of 128 bytes with permuted chunks as fetch_tile leaves them, for the products
// above: what they call a descriptor. `at` is a multiple of 1024. Of b [16, N], whose rows lie along N, the columns
// from 64 on begin `next_columns` bytes after the first.
DEVICE uint64_t matrix_at(uint32_t at, uint32_t next_columns = 0) {
  constexpr uint64_t kPermuted = uint64_t(1) << 62, kEightRows = uint64_t(1024 / 16) << 32;
  return kPermuted | kEightRows | uint64_t(next_columns / 16) << 16 | (shared_address(at) & 0x3ffff) / 16;
}
DEVICE uint64_t further(uint64_t matrix, uint32_t bytes) { return matrix + bytes / 16; }

}  // namespace
}  // namespace fastllm::cuda
