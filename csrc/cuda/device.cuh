// What the kernels need of the hardware: 16-bit floats, exchange inside a warp, a block and a cluster, launches.
//
// The few PTX instructions stand here and nowhere else. Without nvcc the same names come from an emulator
// (tests/cuda_emulator.h), which runs the text of the kernels on a CPU.
#pragma once
#include <stdint.h>

#ifndef FASTLLM_EMULATED

#define DEVICE __device__ __forceinline__

namespace fastllm::cuda {
namespace {

struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

template <class T>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<bf16> = true;

DEVICE float widen(float x) { return x; }
DEVICE float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
DEVICE float widen(half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
DEVICE void narrow(float x, float& y) { y = x; }
DEVICE void narrow(float x, bf16& y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
DEVICE void narrow(float x, half& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

// What follows starts from x again: values made of it are not kept in registers.
DEVICE void forget(uint32_t& x) { asm volatile("" : "+r"(x)); }

DEVICE void sync_block() { __syncthreads(); }
DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }

DEVICE float exp2_approximate(float x) {  // 2 ulp; results below 2^-126 are 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers rounded to T in a register, the first one in its lower half.
template <class T>
DEVICE uint32_t pack(float low, float high) {
  uint32_t both;
  if constexpr (is_bf16<T>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// The dynamic shared memory of the block, at a multiple of 1024 bytes.
DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

// Places in the shared memory of the block are offsets in bytes, which take one register.
DEVICE uint32_t shared_address(uint32_t at) { return uint32_t(__cvta_generic_to_shared(shared_memory())) + at; }

// 16 bytes from global to shared memory, past the registers; the last 16 - bytes of them become 0.
DEVICE void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
// Copies form groups; kGroups of those that were closed last may still be under way after the wait.
DEVICE void close_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Four 8x8 matrices of 16-bit numbers, of which lane l gives the address of row l % 8 of number l / 8. Of each, lane l
// gets the elements 2 * (l % 4) and the next of row l / 4; transposed: of column l / 4.
DEVICE void load_matrices(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void load_matrices_transposed(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b, a [16, 16], b [16, 8], c [16, 8] over the lanes of a warp: lane l has columns (of b: rows) 2 * (l % 4) and
// the next, + 8, and rows (of b: columns) l / 4, + 8. Products are exact, sums in fp32.
template <class T>
DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (is_bf16<T>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Blocks that run at the same time and reach each other's shared memory (sm_90); elsewhere every block is alone.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
DEVICE int cluster_size() {
  uint32_t n;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(n));
  return int(n);
}
DEVICE int cluster_rank() {
  uint32_t n;
  asm volatile("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(n));
  return int(n);
}
DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// What `place`, in this block's shared memory, is in that of block `rank` of the cluster.
DEVICE float from_cluster(const float* place, int rank) {
  float x;
  uint32_t here = uint32_t(__cvta_generic_to_shared(place)), there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(there) : "memory");
  return x;
}
#else
DEVICE int cluster_size() { return 1; }
DEVICE int cluster_rank() { return 0; }
DEVICE void sync_cluster() {}
DEVICE float from_cluster(const float* place, int) { return *place; }
#endif

// What was compiled counts, not the chip: code for sm_80 that runs on a newer one would not synchronise. The code that
// the driver loaded tells by its launch bounds, which mean the same for every architecture and however it is called.
constexpr int kAbsentThreads = 32;  // launch bounds of a kernel that lacks what it is for

template <class Kernel>
bool is_present(Kernel kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.maxThreadsPerBlock > kAbsentThreads;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr int kClusterThreads = 1024;
#else
constexpr int kClusterThreads = kAbsentThreads;
#endif
template <class = void>  // templates are compiled in the files that ask
__global__ void __launch_bounds__(kClusterThreads) has_clusters_kernel() {}

template <class = void>
bool has_clusters() {
  static const bool found = is_present(has_clusters_kernel<>);
  return found;
}

inline int multiprocessors() {
  int device = 0, n = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device);
  return n;
}

inline int most_shared_bytes() {
  int device = 0, bytes = 48 << 10;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

struct Grid {
  int64_t blocks;
  int threads, shared_bytes = 0, cluster = 1;
};

template <class Arguments>
const char* launch(void (*kernel)(Arguments), Grid grid, const Arguments& arguments, void* stream) {
  if (grid.shared_bytes > 48 << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = grid.cluster, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(uint32_t(grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = cudaStream_t(stream);
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace fastllm::cuda

#endif
