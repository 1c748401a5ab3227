// What bindings.cpp knows of a CPU kernel: its arguments and one function pointer per storage type.
//
// Every instruction set (scalar.cpp, avx2.cpp, ...) is compiled once per op, into a table of that op's kernels;
// dispatch.cpp picks the instruction set. Kernels get raw pointers and a range of independent items; they never
// allocate, throw, or start threads.
#pragma once
#include <stdint.h>

namespace fastllm {

enum Type { kFloat, kBFloat16, kHalf, kDouble, kTypes };  // the order of every array of function pointers

// Statistics, gradients of weights and workspaces are in the compute type: float, or double for double.

struct Norm {
  int64_t D;
  bool stream;  // y, or backward dx, past the caches
  double eps, weight_offset;
  const void *x, *residual;   // [N, D], storage type; residual may be null
  void *y, *h;                // [N, D]; h = x + residual is null where it would be x
  const void *weight, *bias;  // [D] in the compute type, or null
  void *mean, *rstd;          // [N] in the compute type; mean is null for rms_norm, both where nobody reads them
  double dropout_p;           // of x, before the residual; h is then also written without one
  uint64_t seed;
  const void *dy, *dh;    // backward: [N, D]; dh may be null. h above is read then
  void *dx, *dresidual;   // dresidual only where it is not dx
  void *dweight, *dbias;  // backward: [stripes, D] partial sums in the compute type; may be null
};

struct Softmax {
  bool stream;      // y, or backward dx, past the caches
  int64_t H, T, S;  // x is [B, H, T, S], contiguous; a row is one (b, h, t)
  double scale;
  bool causal, log;
  const void* x;
  const uint8_t* mask;
  int64_t mask_stride[4];  // 0 where the mask is broadcast
  void* y;
  const void* dy;  // backward reads y and dy
  void* dx;
};

struct CrossEntropy {
  int64_t V, ignore_index;
  double label_smoothing, softcap, z_loss;
  const void* x;          // logits [N, V]
  const int64_t* target;  // [N]: ignore_index, or in [0, V)
  const void* weight;     // [V] in the compute type, or null
  double weight_sum;      // of weight; V without one
  double *loss, *lse;     // [N]; both are double because losses are summed, and because a rounding of the log-sum-exp
                          // would be the largest error of the gradient
  uint8_t* right;         // [N]: whether the target has the largest logit; may be null
  const double* dloss;    // backward: [N]
  void* dx;               // [N, V]; may be x
};

enum Activation { kRelu, kGelu, kGeluTanh, kSilu };

struct Gated {  // y = act(gate) * up
  int64_t D;    // of a row
  int activation;
  const void *gate, *up;  // [N, D], storage type, rows this far apart
  int64_t gate_stride, up_stride;
  void* y;
  const void* dy;  // backward: [N, D]
  void *dgate, *dup;
  int64_t grad_stride;
};

struct BiasAct {  // y = act(x + bias)
  int64_t D;
  int activation;
  const void *x, *bias;  // [N, D] and [D] in the compute type; bias may be null
  void* y;
  const void* dy;  // backward: [N, D]
  void* dx;
  void* dbias;  // [stripes, D] partial sums in the compute type; may be null
};

struct AdamW {
  double lr, beta1, beta2, eps, weight_decay;
  double bias1, bias2;  // 1 - beta^step
  bool maximize;
  int64_t n;
  void* p;              // [n], storage type
  const void* grad;     // [n], storage type
  void *m, *v, *v_max;  // [n], compute type; v_max may be null
};

struct Heads {  // a [B, H, T, D] tensor of the storage type, any strides (in elements)
  void* data;
  int64_t b, h, t, d;
  // Where it is a cache in pages [pages, H, page_size, D]: row t is row t % page_size of page pages[t / page_size].
  const int32_t* pages;
  int64_t page_size;
};

struct Rope {
  int64_t B, H, Hk, T, D, R;  // R of D elements are rotated; Hk = 0 where there is no k
  bool interleaved, inverse, whole;
  Heads q, k, yq, yk;
  const void *cos, *sin;  // [positions, R / 2], or R where `whole`, perhaps for each batch entry
  int table_type;
  int64_t table_b, table_t;  // strides of both
  int64_t offset;            // t stands at position t + offset + offsets[b]
  const int64_t* offsets;    // may be null
  // [sequences + 1]: then B is 1, t counts within its sequence, and offsets has one for each.
  const int64_t* cu_seqlens;
  int64_t sequences;
};

struct Scores {  // a [B, H, T, S] tensor that may be broadcast (stride 0)
  void* data;
  int64_t b, h, t, s;
  int type;
};

struct Attention {
  int64_t B, H, Hkv, T, S, D, Dv;
  double scale, softcap;
  int64_t q_offset, left, right;  // left, right: keys visible before and after a query's position; -1 is unbounded
  Heads q, k, v, o;
  // [B, H, T], natural logarithm; in fp32 its rounding would be the largest error of the backward pass. Null where
  // nobody reads it.
  double* lse;
  int64_t lse_b, lse_h;             // its strides, and dlse's
  int64_t first_head;               // what b * H + h starts at in the counters of dropout
  Scores mask;                      // bytes (type kTypes), 0 = hidden; data may be null
  Scores bias;                      // any storage type; data may be null
  const void *alibi_slopes, *sink;  // [B, H] and [H] in the compute type; may be null
  int64_t alibi_stride_b;           // 0 for slopes [H]
  double dropout_p;
  uint64_t seed;

  int64_t together;  // forward: blocks of queries that one pass over the keys serves, at most; 0 is 1
  int64_t splits;    // decoding: key ranges that are worked on apart from each other
  void* partial;     // [B, Hkv, splits, H / Hkv * T, Dv + 2] in the compute type: o, maximum and sum of each range

  Heads grad_o, dq, dk, dv;  // backward
  const double* dlse;        // [B, H, T]; may be null
  bool partial_keys;         // k and v are some of the keys that o and lse are of
  int64_t chunks;            // key ranges that are worked on apart from each other; > 1 needs dq_partial
  void* dq_partial;          // [B, H, chunks, T, D] in the compute type
  Scores dbias;              // like bias; kDouble, or kFloat (the compute type); data may be null
  bool dbias_adds;           // to zeros; or else every element is written, once
  double* dsink_partial;     // [B, chunks, H]; null without a sink
};

struct WeightOnly {  // y = x w^T + bias for a few rows of x, in fp32
  int64_t M, N, K;
  const float* x;  // [M, K]
  int64_t x_row;
  const void* weight;            // [N, K] of a storage type, or packed words (weight_only.inl)
  int64_t bits, group;           // packed: 8 or 4, and how many numbers of a row share a scale: a multiple of 32
  const void *scales, *offsets;  // packed: [panels, groups, 16], fp32 for 8 bits and bf16 for 4; offsets may be null
  int64_t planes;                // packed: x in 2 or 3 planes of 8 bits, where the instruction set multiplies bytes
  const float* bias;             // [N], may be null
  float* y;                      // [M, N]
  int64_t y_row;
  bool add;  // to what is in y
};

struct WeightBlock {   // rows [n, n + rows) and columns [k, k + depth) of a packed weight
  int64_t n, rows;     // n is a multiple of 16
  int64_t k, columns;  // k is a multiple of 32
};

struct Rotation {  // rows of one sequence, rotated at their positions or as they are, to where they are kept
  Heads from, to;
  int64_t H, T, D, first;     // row t goes to row first + t
  int64_t position, rotated;  // of row 0; how many of the D values are rotated
  const void *cos, *sin;      // [positions, rotated / 2]
  int64_t cos_row, sin_row, cos_d, sin_d;
  int type;          // of cos and sin
  bool interleaved;  // value pairs (2i, 2i + 1) are rotated, not (i, i + rotated / 2)
};

struct Operand {  // of a matrix product: element (i, j) is data[i * row + j * column], and row or column is 1
  const void* data;
  int64_t row, column;
};

struct Gemm {  // c = a b + bias, or c += a b + bias, of one storage type; sums are in the compute type
  int64_t M, N, K;
  Operand a, b;  // [M, K] and [K, N]
  void* c;       // [M, N], element (i, j) at i * c_row + j; not read unless `add`
  int64_t c_row;
  bool add;
  const void* bias;  // [N], added to every row of the result; may be null
  void* y;           // activation(c), with c's rows; may be c, or null without one
  int activation;
  bool panels;  // b is in panels, as `pack` made them; pieces of columns then begin at one
};

// One table per op and instruction set, named <op>_<instruction set>; an entry per storage type.

struct NormKernels {
  void (*layer_norm_fwd[kTypes])(const Norm&, int64_t begin, int64_t end);
  void (*layer_norm_bwd[kTypes])(const Norm&, int64_t stripe, int64_t begin, int64_t end);
  void (*rms_norm_fwd[kTypes])(const Norm&, int64_t begin, int64_t end);
  void (*rms_norm_bwd[kTypes])(const Norm&, int64_t stripe, int64_t begin, int64_t end);
};

struct SoftmaxKernels {
  void (*fwd[kTypes])(const Softmax&, int64_t begin, int64_t end, void* workspace);
  void (*bwd[kTypes])(const Softmax&, int64_t begin, int64_t end);
};

struct CrossEntropyKernels {
  void (*fwd[kTypes])(const CrossEntropy&, int64_t begin, int64_t end);
  void (*bwd[kTypes])(const CrossEntropy&, int64_t begin, int64_t end);
};

struct ActivationKernels {  // ranges of elements; of rows where sums over rows are wanted
  void (*gated_fwd[kTypes])(const Gated&, int64_t begin, int64_t end);
  void (*gated_bwd[kTypes])(const Gated&, int64_t begin, int64_t end);
  void (*bias_act_fwd[kTypes])(const BiasAct&, int64_t begin, int64_t end);
  void (*bias_act_bwd[kTypes])(const BiasAct&, int64_t stripe, int64_t begin, int64_t end);
};

struct AdamWKernels {
  void (*step[kTypes])(const AdamW&, int64_t begin, int64_t end);
};

struct RopeKernels {
  void (*rope[kTypes])(const Rope&, int64_t begin, int64_t end, void* workspace);  // of B * T, b fastest
};

struct AttentionKernels {
  int64_t (*items[kTypes])(const Attention&);
  int64_t (*bytes[kTypes])(const Attention&);
  void (*run[kTypes])(const Attention&, int64_t item, void* workspace);
};

struct AttentionBwdKernels {
  int64_t (*items[kTypes])(const Attention&);
  int64_t (*bytes[kTypes])(const Attention&);
  void (*run[kTypes])(const Attention&, int64_t item, void* workspace);
  void (*sum_dq[kTypes])(const Attention&, int64_t begin, int64_t end);
};

struct AttentionDecodeBwdKernels {
  int64_t (*ranges[kTypes])(const Attention&);  // the number of `chunks`; 0 for what is attention_bwd's
  int64_t (*bytes[kTypes])(const Attention&);
  void (*run[kTypes])(const Attention&, int64_t item, void* workspace);  // an item is one of [B, Hkv, chunks]
};

struct WeightOnlyKernels {
  void (*rows[kTypes])(const WeightOnly&, int64_t begin, int64_t end);  // rows of a weight in a storage type
  void (*panels[2])(const WeightOnly&, const void* prepared, int64_t begin, int64_t end);  // 4 bits, 8 bits
  int64_t (*bytes)(const WeightOnly&);  // of what `prepare` makes of x for `panels`
  void (*prepare)(const WeightOnly&, void* prepared);
  void (*columns[2])(const WeightOnly&, int64_t begin, int64_t end);  // of y = x w for few rows of x, [M, N]
  // A block of w as linear's gemm takes b, in panels of `width` columns: of the product with w, or its transpose.
  void (*block[2])(const WeightOnly&, const WeightBlock&, float* panels, int64_t width);
  void (*transposed_block[2])(const WeightOnly&, const WeightBlock&, float* panels, int64_t width);
  void (*dequantize[kTypes])(const WeightOnly&, int64_t begin, int64_t end, void* out);
  void (*widen[kTypes])(const void* x, float* y, int64_t n);
  void (*narrow[kTypes])(const float* x, void* y, int64_t n);
};

struct AttentionDecodeKernels {
  int64_t (*splits[kTypes])(const Attention&);
  int64_t (*bytes[kTypes])(const Attention&);
  void (*run[kTypes])(const Attention&, int64_t item, void* workspace);  // an item is one of [B, Hkv, splits]
  void (*merge[kTypes])(const Attention&, int64_t begin, int64_t end);   // of [B, Hkv], where splits > 1
  void (*rotate[kTypes])(const Rotation&, int64_t begin, int64_t end);   // of [H, T]
};

// A product of the rows and columns of c that it is given.
using GemmKernel = void (*)(const Gemm&, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end, void* memory);

struct LinearKernels {
  int64_t (*gemm_bytes[kTypes])(const Gemm&);
  GemmKernel gemm[kTypes];
  // For few rows, all at once, of a contiguous a and the transpose of a contiguous b; 16-bit types alone.
  int64_t (*few_rows_bytes[kTypes])(const Gemm&);
  GemmKernel few_rows[kTypes];
  void (*add_rows[kTypes])(const void* dy, int64_t N, int64_t begin, int64_t end, void* sums);
  int64_t (*panel[kTypes])();  // columns of b in a panel; all of them have memory for so many
  void (*pack[kTypes])(const Operand& b, int64_t K, int64_t N, void* panels);  // in the compute type
};

struct GenerationKernels {  // on fp32, whatever the weights and the cache are
  void (*rotate)(float* x, const float* cos, const float* sin, int64_t half);
  void (*activate)(int kind, float* gate, const float* up, int64_t n);
  void (*add)(float* x, const float* y, int64_t n);
};

struct PeakKernels {
  double (*multiply_adds[kTypes])(int64_t rounds, void* sink);  // returns how many operations that was
};

// Every op: X(op, type of its tables, isa). A new one is a line here, one in setup.py's OPS, and csrc/cpu/<op>.inl.
// clang-format off
#define FASTLLM_OPS(X, isa)                           \
  X(norm, NormKernels, isa)                           \
  X(softmax, SoftmaxKernels, isa)                     \
  X(cross_entropy, CrossEntropyKernels, isa)          \
  X(activation, ActivationKernels, isa)               \
  X(rope, RopeKernels, isa)                           \
  X(adamw, AdamWKernels, isa)                         \
  X(attention, AttentionKernels, isa)                 \
  X(attention_bwd, AttentionBwdKernels, isa)          \
  X(attention_decode, AttentionDecodeKernels, isa)    \
  X(attention_decode_bwd, AttentionDecodeBwdKernels, isa) \
  X(weight_only, WeightOnlyKernels, isa)              \
  X(linear, LinearKernels, isa)                       \
  X(generation, GenerationKernels, isa)               \
  X(peak, PeakKernels, isa)
// clang-format on

// All tables of one instruction set.
struct Kernels {
  const char* name;
#define TABLE_MEMBER(op, type, isa) const type* op;
  FASTLLM_OPS(TABLE_MEMBER, )
#undef TABLE_MEMBER
};

const Kernels& kernels();  // the tables in use

}  // namespace fastllm
