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

struct CrossEntropy {
  int64_t N, V;  // x is [N, V], contiguous
  const void* x;
  const int64_t* target;  // [N]
  Vector weight;          // [V]
  int64_t ignore_index;
  float label_smoothing, softcap, z_loss;
  double* total;       // [2], of the rows kept: the sum of their weights, their number. For the mean, else null
  double* weight_sum;  // [1], of all classes. For smoothed targets with weights, else null
  double* row_loss;    // [N] where the loss is reduced, else null
  float* loss;         // [1] where it is reduced, else [N]
  double* lse;         // [N]; forward: may be null
  bool* right;         // [N], whether the target has the largest logit; may be null
  Vector dloss;        // [1], or [N]
  bool dloss_per_row;
  void* dx;
};
Error cross_entropy_total(const CrossEntropy& a, Stream stream);  // writes total and weight_sum, as wanted
// Both make total and weight_sum first.
Error cross_entropy_fwd(Type type, const CrossEntropy& a, bool reduced, Stream stream);
Error cross_entropy_bwd(Type type, const CrossEntropy& a, Stream stream);
// row_loss and, where dx is not null, the gradient, which may overwrite x. total is read: it is of more rows than
// these.
Error cross_entropy_rows(Type type, const CrossEntropy& a, Stream stream);

// A [B, H, T, D] tensor of 16-bit numbers, strides in elements. A row is contiguous; in what is read it starts at a
// multiple of 16 bytes and is filled up with zeros to one.
struct Heads {
  void* data;
  int64_t b, h, t;
};

struct Pairs {  // a number for every query and key: [B, H, T, S], any strides, 0 where it is broadcast; data may be
                // null
  void* data;
  int64_t b, h, t, s;
  Type type;
};

struct QueryRow {  // what the backward pass needs to know of a query
  float lse;       // times log2(e); +inf, which makes every probability 0, where it sees nothing
  float delta;     // sum(o * do) - dlse
};

struct Attention {
  int B, H, Hkv, T, S, D, Dv;  // D and Dv are at most kMostHeadSize
  float scale, softcap;        // softcap 0 is off
  int q_offset, first, last;   // query i stands at key i + q_offset and sees keys i + first to i + last
  Heads q, k, v, o;
  double* lse;    // [B, H, T], natural logarithm
  Pairs mask;     // bytes, 0 = hidden
  Pairs bias;     // any type
  Vector slopes;  // [B, H] or [H] numbers
  bool slopes_per_batch;
  Vector sink;  // [H] numbers

  Heads grad_o, dq, dk, dv;  // backward
  const double* dlse;        // [B, H, T]; may be null
  QueryRow* rows;            // [B, H, T], written first
  Pairs dbias;               // [B, H, T, S] of the scores' gradients, zeroed; data may be null
  void* dsink;               // [H], of sink's type; null without a sink
};
constexpr int kMostHeadSize = 128;
Error attention_fwd(Type type, const Attention& a, Stream stream);  // on Hopper by its own kernel, where that can
bool takes_attention_fwd_hopper(const Attention& a);
Error attention_fwd_hopper(Type type, const Attention& a, Stream stream);
Error attention_bwd(Type type, const Attention& a, Stream stream);

}  // namespace fastllm::cuda
