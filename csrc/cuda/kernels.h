// What bindings.cpp knows of the GPU kernels: their arguments, and launchers that return null or what CUDA said.
//
// A launcher chooses the kernel and its grid from sizes and alignment, puts it on the stream and returns; it never
// allocates or waits. Nothing here knows PyTorch, so the folder can be built into another program as it stands.
#pragma once
#include <stdint.h>

namespace fastllm::cuda {

enum Type { kFloat, kBFloat16, kHalf };

using Error = const char*;
using Stream = void*;  // cudaStream_t

struct Vector {  // a weight or a bias of D numbers, or none (data is null)
  const void* data;
  Type type;
};

struct Norm {
  int64_t N, D;
  float eps, weight_offset;
  const void *x, *residual;  // [N, D]; residual may be null
  void *y, *h;               // [N, D]; h = x + residual is null where residual is
  Vector weight, bias;
  float *mean, *rstd;                  // [N]; mean is null for rms_norm
  const void *dy, *dh;                 // backward: [N, D]; dh may be null. h above is read then
  void* dx;                            // [N, D]
  int64_t stripes;                     // backward: ranges of rows that have sums of their own
  float *dweight_parts, *dbias_parts;  // [stripes, D]; null where no such gradient is wanted
};
Error norm_fwd(Type type, const Norm& a, Stream stream);
int64_t norm_bwd_stripes(int64_t N);  // a few for each multiprocessor, so that none waits long for the last
Error norm_bwd(Type type, const Norm& a, Stream stream);
// out[d] = sum over stripes of parts[stripe][d], always in the same order.
Error sum_stripes(const float* parts, int64_t stripes, int64_t D, void* out, Type type, Stream stream);

struct Softmax {
  int64_t N, H, T, S;  // x is [B, H, T, S], contiguous; N = B * H * T rows
  float scale;
  bool causal, log;
  const void* x;
  const uint8_t* mask;
  int64_t mask_stride[4];  // 0 where the mask is broadcast
  void* y;
  const void* dy;  // backward reads y and dy
  void* dx;
};
Error softmax_fwd(Type type, const Softmax& a, Stream stream);
Error softmax_bwd(Type type, const Softmax& a, Stream stream);

}  // namespace fastllm::cuda
