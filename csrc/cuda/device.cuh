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

// The dynamic shared memory of the block.
DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
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

template <class Kernel>
bool has_clusters(Kernel kernel) {
  // What was compiled counts, not the chip: code for sm_80 that runs on a newer one would not synchronise.
  static const bool found = [kernel] {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
  }();
  return found;
}

inline int multiprocessors() {
  int device = 0, n = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device);
  return n;
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
