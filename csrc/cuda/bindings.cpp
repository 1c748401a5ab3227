// Tensors in, checks, launch: the GPU kernels as fastllm_cuda::<op>, in the calling convention of fastllm/ops/.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <dlfcn.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/kernels.h"

#ifndef FASTLLM_CUDA_DEVICE
#define FASTLLM_CUDA_DEVICE CUDA  // the emulator's kernels take CPU tensors
#endif

namespace fastllm::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The device of `x` is made current; the stream is the one that torch has current there.
class OnDeviceOf {
 public:
#ifdef FASTLLM_EMULATED
  explicit OnDeviceOf(const Tensor&) {}
#else
  explicit OnDeviceOf(const Tensor& x) : guard_(x.get_device_index()) {
    // Found at run time: a torch without CUDA does not have it, and a weak reference would miss it, as torch's
    // libraries are loaded locally. (The stable ABI's own way, Stream::nativeHandle, begins with torch 2.13.)
    using Find = int32_t (*)(int32_t device, void** stream);
    static const Find find =
        (Find)dlsym(dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD), "aoti_torch_get_current_cuda_stream");
    STD_TORCH_CHECK(find && find(x.get_device_index(), &stream_) == 0, "fastllm: torch does not tell its CUDA stream");
  }
#endif
  Stream stream() const { return stream_; }

 private:
  Stream stream_ = nullptr;
#ifndef FASTLLM_EMULATED
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

void check(Error error, const char* op) { STD_TORCH_CHECK(!error, op, ": ", error); }

Type type_of(const Tensor& x, const char* op) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return kFloat;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kHalf;
    default:
      STD_TORCH_CHECK(false, op, ": the CUDA C++ kernels take float32, bfloat16 and float16");
  }
  return kFloat;
}

std::vector<int64_t> shape_of(const Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes.data(), sizes.data() + sizes.size()};
}
Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, type);
}
Tensor none_like(const Tensor& x) { return empty(x, {0}, x.scalar_type()); }
const void* data(const MaybeTensor& x) { return x ? x->data_ptr() : nullptr; }

struct Rows {
  int64_t N, D;
  std::vector<int64_t> shape, leading;

  Rows(const Tensor& x, const char* op) : shape(shape_of(x)) {
    STD_TORCH_CHECK(!shape.empty() && shape.back() > 0 && x.is_contiguous(), op,
                    ": x must be contiguous [..., D] with D >= 1");
    D = shape.back();
    N = x.numel() / D;
    leading.assign(shape.begin(), shape.end() - 1);
  }
};
void check_like(const Tensor& got, const Tensor& like, const char* op, const char* name) {
  STD_TORCH_CHECK(got.is_contiguous() && got.numel() == like.numel() && got.scalar_type() == like.scalar_type(), op,
                  ": ", name, " must be contiguous, with the shape and dtype of x");
}
MaybeTensor contiguous_vector(const MaybeTensor& w, int64_t D, const char* op, const char* name) {
  if (!w) return {};
  STD_TORCH_CHECK(w->numel() == D, op, ": ", name, " must have ", D, " elements, got ", w->numel());
  return torch::stable::contiguous(*w);
}
Vector vector(const MaybeTensor& w, const char* op) { return {data(w), w ? type_of(*w, op) : kFloat}; }

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward(const char* op, const Tensor& x, const MaybeTensor& weight,
                                                        const MaybeTensor& bias, const MaybeTensor& residual,
                                                        double eps, double weight_offset, bool has_mean) {
  const Rows r(x, op);
  if (residual) check_like(*residual, x, op, "residual");
  const MaybeTensor w = contiguous_vector(weight, r.D, op, "weight"), b = contiguous_vector(bias, r.D, op, "bias");
  const Tensor y = empty(x, r.shape, x.scalar_type());
  const Tensor h = residual ? empty(x, r.shape, x.scalar_type()) : none_like(x);
  const Tensor rstd = empty(x, r.leading, ScalarType::Float);
  const Tensor mean = has_mean ? empty(x, r.leading, ScalarType::Float) : h;
  Norm a{};
  a.N = r.N, a.D = r.D;
  a.eps = float(eps), a.weight_offset = float(weight_offset);
  a.x = x.data_ptr(), a.y = y.data_ptr();
  if (residual) a.residual = residual->data_ptr(), a.h = h.data_ptr();
  a.weight = vector(w, op), a.bias = vector(b, op);
  a.mean = has_mean ? (float*)mean.data_ptr() : nullptr;
  a.rstd = (float*)rstd.data_ptr();
  if (r.N) {
    const OnDeviceOf device(x);
    check(norm_fwd(type_of(x, op), a, device.stream()), op);
  }
  return {y, h, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(const char* op, const Tensor& dy, const MaybeTensor& dh,
                                                 const Tensor& h, const MaybeTensor& weight, const Tensor* mean,
                                                 const Tensor& rstd, bool has_bias, double weight_offset) {
  const Rows r(h, op);
  check_like(dy, h, op, "dy");
  if (dh) check_like(*dh, h, op, "dh");
  STD_TORCH_CHECK(rstd.numel() == r.N && (!mean || mean->numel() == r.N), op,
                  ": mean and rstd must have one number per row");
  const MaybeTensor w = contiguous_vector(weight, r.D, op, "weight");
  const Tensor dx = empty(h, r.shape, h.scalar_type());
  Tensor dweight = weight ? empty(*weight, {r.D}, weight->scalar_type()) : none_like(h);
  Tensor dbias = empty(h, {has_bias ? r.D : 0}, ScalarType::Float);
  if (!r.N) return {dx, torch::stable::zero_(dweight), torch::stable::zero_(dbias)};

  const OnDeviceOf device(h);
  const int64_t stripes = norm_bwd_stripes(r.N);
  const Tensor dweight_parts = empty(h, {weight ? stripes : 0, r.D}, ScalarType::Float);
  const Tensor dbias_parts = empty(h, {has_bias ? stripes : 0, r.D}, ScalarType::Float);
  Norm a{};
  a.N = r.N, a.D = r.D, a.stripes = stripes;
  a.weight_offset = float(weight_offset);
  a.h = h.data_ptr(), a.dy = dy.data_ptr(), a.dx = dx.data_ptr();
  a.dh = data(dh);
  a.weight = vector(w, op);
  a.mean = mean ? (float*)mean->data_ptr() : nullptr;
  a.rstd = (float*)rstd.data_ptr();
  a.dweight_parts = weight ? (float*)dweight_parts.data_ptr() : nullptr;
  a.dbias_parts = has_bias ? (float*)dbias_parts.data_ptr() : nullptr;
  check(norm_bwd(type_of(h, op), a, device.stream()), op);
  if (weight)
    check(sum_stripes(a.dweight_parts, stripes, r.D, dweight.data_ptr(), type_of(dweight, op), device.stream()), op);
  if (has_bias) check(sum_stripes(a.dbias_parts, stripes, r.D, dbias.data_ptr(), kFloat, device.stream()), op);
  return {dx, dweight, dbias};
}

// The schemas have dropout, which these kernels have not: fastllm/ops/norm.py does not ask them for it.
void no_dropout(double dropout_p, const char* op) {
  STD_TORCH_CHECK(dropout_p == 0, op, ": the CUDA C++ kernels have no dropout");
}
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_fwd(Tensor x, MaybeTensor weight, MaybeTensor bias,
                                                          MaybeTensor residual, MaybeTensor, double eps,
                                                          double dropout_p) {
  no_dropout(dropout_p, "layer_norm_fwd");
  return norm_forward("layer_norm_fwd", x, weight, bias, residual, eps, 0.0, true);
}
std::tuple<Tensor, Tensor, Tensor> rms_norm_fwd(Tensor x, MaybeTensor weight, MaybeTensor residual, MaybeTensor,
                                                double eps, double weight_offset, double dropout_p) {
  no_dropout(dropout_p, "rms_norm_fwd");
  auto [y, h, none, rstd] = norm_forward("rms_norm_fwd", x, weight, {}, residual, eps, weight_offset, false);
  return {y, h, rstd};
}
// Without dropout the residual's gradient is dx: dresidual is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_bwd(Tensor dy, MaybeTensor dh, Tensor h, MaybeTensor weight,
                                                          Tensor mean, Tensor rstd, MaybeTensor, double dropout_p,
                                                          bool has_bias, bool) {
  no_dropout(dropout_p, "layer_norm_bwd");
  auto [dx, dweight, dbias] = norm_backward("layer_norm_bwd", dy, dh, h, weight, &mean, rstd, has_bias, 0.0);
  return {dx, none_like(h), dweight, dbias};
}
std::tuple<Tensor, Tensor, Tensor> rms_norm_bwd(Tensor dy, MaybeTensor dh, Tensor h, MaybeTensor weight, Tensor rstd,
                                                MaybeTensor, double weight_offset, double dropout_p, bool) {
  no_dropout(dropout_p, "rms_norm_bwd");
  auto [dx, dweight, none] = norm_backward("rms_norm_bwd", dy, dh, h, weight, nullptr, rstd, false, weight_offset);
  return {dx, none_like(h), dweight};
}

Tensor softmax_forward(Tensor x, MaybeTensor mask, double scale, bool causal, bool log) {
  const char* op = "softmax_fwd";
  STD_TORCH_CHECK(x.dim() == 4 && x.is_contiguous(), op, ": x must be contiguous [B, H, T, S]");
  Softmax a{};
  a.H = x.size(1), a.T = x.size(2), a.S = x.size(3);
  a.scale = float(scale), a.causal = causal, a.log = log;
  a.x = x.data_ptr();
  if (mask) {
    STD_TORCH_CHECK(mask->dim() == 4 && mask->scalar_type() == ScalarType::Bool, op, ": mask must be 4-D bool");
    for (int i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(mask->size(i) == x.size(i) || mask->size(i) == 1, op, ": mask must broadcast to x");
      a.mask_stride[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
    }
    a.mask = (const uint8_t*)mask->data_ptr();
  }
  const Tensor y = empty(x, shape_of(x), x.scalar_type());
  a.y = y.data_ptr();
  if (x.numel()) {
    const OnDeviceOf device(x);
    a.N = x.numel() / a.S;
    check(softmax_fwd(type_of(x, op), a, device.stream()), op);
  }
  return y;
}

Tensor softmax_backward(Tensor dy, Tensor y, double scale, bool log) {
  const char* op = "softmax_bwd";
  STD_TORCH_CHECK(y.dim() >= 1 && y.is_contiguous(), op, ": y must be contiguous [..., S]");
  check_like(dy, y, op, "dy");
  Softmax a{};
  a.S = y.size(-1);
  a.scale = float(scale), a.log = log;
  a.y = y.data_ptr(), a.dy = dy.data_ptr();
  const Tensor dx = empty(y, shape_of(y), y.scalar_type());
  a.dx = dx.data_ptr();
  if (y.numel()) {
    const OnDeviceOf device(y);
    a.N = y.numel() / a.S;
    check(softmax_bwd(type_of(y, op), a, device.stream()), op);
  }
  return dx;
}

MaybeTensor at_most_float(const MaybeTensor& x) {
  return x && x->scalar_type() == ScalarType::Double ? MaybeTensor(torch::stable::to(*x, ScalarType::Float)) : x;
}

constexpr int64_t kNone = 0, kMean = 1;  // of the reductions; 2 is the sum

// A call of cross-entropy in the kernels' terms, and the tensors that it needed.
struct LossCall {
  CrossEntropy a{};
  MaybeTensor weight;
  Tensor total;

  LossCall(const char* op, const Tensor& x, const Tensor& target, const MaybeTensor& weight_in, int64_t ignore_index,
           int64_t reduction, double label_smoothing, double softcap, double z_loss)
      : total(empty(x, {3}, ScalarType::Double)) {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0 && x.is_contiguous(), op, ": x must be contiguous [N, V]");
    a.N = x.size(0), a.V = x.size(1);
    STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && target.is_contiguous() && target.numel() == a.N, op,
                    ": target must be contiguous int64 [N]");
    weight = contiguous_vector(at_most_float(weight_in), a.V, op, "weight");
    a.x = x.data_ptr(), a.target = (const int64_t*)target.data_ptr();
    a.weight = vector(weight, op);
    a.ignore_index = ignore_index;
    a.label_smoothing = float(label_smoothing), a.softcap = float(softcap), a.z_loss = float(z_loss);
    a.mean = reduction == kMean;
    if (a.mean || (weight && label_smoothing > 0)) a.total = (double*)total.data_ptr();
  }
};

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(Tensor x, Tensor target, MaybeTensor weight,
                                                         int64_t ignore_index, int64_t reduction,
                                                         double label_smoothing, double softcap, double z_loss,
                                                         bool accuracy) {
  const char* op = "cross_entropy_fwd";
  LossCall call(op, x, target, weight, ignore_index, reduction, label_smoothing, softcap, z_loss);
  CrossEntropy& a = call.a;
  const bool reduced = reduction != kNone;
  const Tensor loss = empty(x, reduced ? std::vector<int64_t>{} : std::vector<int64_t>{a.N}, ScalarType::Float);
  const Tensor row_loss = empty(x, {reduced ? a.N : 0}, ScalarType::Double), lse = empty(x, {a.N}, ScalarType::Double);
  const Tensor right = empty(x, {accuracy ? a.N : 0}, ScalarType::Bool);
  a.loss = (float*)loss.data_ptr();
  a.row_loss = reduced ? (double*)row_loss.data_ptr() : nullptr;
  a.lse = (double*)lse.data_ptr();
  a.right = accuracy ? (bool*)right.data_ptr() : nullptr;
  if (a.N || reduced) {
    const OnDeviceOf device(x);
    check(cross_entropy_fwd(type_of(x, op), a, reduced, device.stream()), op);
  }
  return {loss, lse, right};
}

Tensor cross_entropy_backward(Tensor dloss, Tensor x, Tensor target, MaybeTensor weight, Tensor lse,
                              int64_t ignore_index, int64_t reduction, double label_smoothing, double softcap,
                              double z_loss) {
  const char* op = "cross_entropy_bwd";
  LossCall call(op, x, target, weight, ignore_index, reduction, label_smoothing, softcap, z_loss);
  CrossEntropy& a = call.a;
  STD_TORCH_CHECK(lse.is_contiguous() && lse.numel() == a.N && lse.scalar_type() == ScalarType::Double, op,
                  ": lse must be contiguous float64 [N]");
  a.dloss_per_row = reduction == kNone;
  const MaybeTensor grad = contiguous_vector(at_most_float(dloss), a.dloss_per_row ? a.N : 1, op, "dloss");
  a.dloss = vector(grad, op);
  a.lse = (double*)lse.data_ptr();
  const Tensor dx = empty(x, {a.N, a.V}, x.scalar_type());
  a.dx = dx.data_ptr();
  if (a.N) {
    const OnDeviceOf device(x);
    check(cross_entropy_bwd(type_of(x, op), a, device.stream()), op);
  }
  return dx;
}

// A tensor as attention's kernels read it: itself, or a copy where its rows are not contiguous, aligned and filled up.
Tensor readable(const Tensor& x, Type type, const char* op, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4 && type_of(x, op) == type, op, ": ", name, " must be 4-D, with the dtype of q");
  const int64_t D = x.size(3);
  bool fits = x.stride(3) == 1 && D % 8 == 0 && uintptr_t(x.data_ptr()) % 16 == 0;
  for (int i = 0; i < 3; ++i) fits = fits && (x.stride(i) % 8 == 0 || x.size(i) == 1);
  if (fits || !x.numel()) return x;
  Tensor whole = empty(x, {x.size(0), x.size(1), x.size(2), (D + 7) / 8 * 8}, x.scalar_type());
  torch::stable::zero_(whole);
  Tensor part = torch::stable::narrow(whole, 3, 0, D);
  torch::stable::copy_(part, x);
  return part;
}
Heads heads(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// A new [B, H, T, D] in the memory order of `like` (heads inside positions where `like` is a view of [B, T, H, D]).
Tensor new_heads(const Tensor& like, int64_t D) {
  const int64_t B = like.size(0), H = like.size(1), T = like.size(2);
  if (like.stride(1) < like.stride(2))
    return torch::stable::transpose(empty(like, {B, T, H, D}, like.scalar_type()), 1, 2);
  return empty(like, {B, H, T, D}, like.scalar_type());
}

// What the schemas call the options, in their order.
struct Options {
  const MaybeTensor &mask, &bias, &alibi_slopes, &sink, &seed;
  double scale, softcap;
  int64_t q_offset, left, right;
  double dropout_p;
};

// A call in the kernels' terms, and the tensors that it needed converted.
struct AttentionCall {
  const char* op;
  Attention a{};
  Type type;
  Tensor q, k, v;
  MaybeTensor bias, slopes, sink;

  AttentionCall(const char* op, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Options& options)
      : op(op),
        type(type_of(q_in, op)),
        q(readable(q_in, type, op, "q")),
        k(readable(k_in, type, op, "k")),
        v(readable(v_in, type, op, "v")),
        bias(at_most_float(options.bias)) {
    STD_TORCH_CHECK(type != kFloat, op, ": the CUDA C++ kernels take bfloat16 and float16");
    const int64_t B = q.size(0), H = q.size(1), T = q.size(2), D = q.size(3);
    const int64_t Hkv = k.size(1), S = k.size(2), Dv = v.size(3);
    STD_TORCH_CHECK(k.size(0) == B && v.size(0) == B && v.size(1) == Hkv && v.size(2) == S && k.size(3) == D, op,
                    ": q [B, H, T, D], k [B, Hkv, S, D] and v [B, Hkv, S, Dv] do not fit each other");
    STD_TORCH_CHECK(H == 0 || (Hkv > 0 && H % Hkv == 0), op, ": H must be a multiple of Hkv");
    STD_TORCH_CHECK(D > 0 && Dv > 0 && D <= kMostHeadSize && Dv <= kMostHeadSize, op, ": D and Dv must be 1 to ",
                    kMostHeadSize);
    STD_TORCH_CHECK(!options.seed && options.dropout_p == 0, op, ": the CUDA C++ kernels have no dropout");
    constexpr int64_t kMost = int64_t(1) << 30;  // positions are added to each other in 32 bits
    STD_TORCH_CHECK(T < kMost && S < kMost && B * H * (T / 128 + 1) < 2 * kMost, op, ": too many queries or keys");
    a.B = int(B), a.H = int(H), a.T = int(T), a.D = int(D), a.Hkv = int(Hkv), a.S = int(S), a.Dv = int(Dv);
    a.scale = float(options.scale), a.softcap = float(options.softcap);
    // Beyond these limits nothing changes, and inside them no kernel overflows.
    const auto within = [](int64_t x, int64_t low, int64_t high) { return int(x < low ? low : x > high ? high : x); };
    a.q_offset = within(options.q_offset, -kMost, kMost);
    const int64_t left = std::min(options.left, 4 * kMost), right = std::min(options.right, 4 * kMost);
    a.first = left >= 0 ? within(a.q_offset - left, -T, S) : int(-T);
    a.last = right >= 0 ? within(a.q_offset + right, -T, S) : int(S);
    a.q = heads(q), a.k = heads(k), a.v = heads(v);
    if (options.mask) {
      STD_TORCH_CHECK(options.mask->scalar_type() == ScalarType::Bool, op, ": mask must be bool");
      a.mask = pairs(*options.mask, "mask", kFloat);
    }
    if (bias) a.bias = pairs(*bias, "bias", type_of(*bias, op));
    if (options.alibi_slopes) {
      const int64_t n = options.alibi_slopes->numel();
      STD_TORCH_CHECK(n == H || n == B * H, op, ": alibi_slopes must be [H] or [B, H]");
      slopes = contiguous_vector(at_most_float(options.alibi_slopes), n, op, "alibi_slopes");
      a.slopes = vector(slopes, op);
      a.slopes_per_batch = options.alibi_slopes->dim() == 2;
    }
    sink = contiguous_vector(at_most_float(options.sink), H, op, "sink");
    a.sink = vector(sink, op);
  }

  Pairs pairs(const Tensor& x, const char* name, Type x_type) const {
    STD_TORCH_CHECK(x.dim() == 4, op, ": ", name, " must be 4-D");
    const int64_t full[4] = {a.B, a.H, a.T, a.S};
    int64_t stride[4];
    for (int i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(x.size(i) == full[i] || x.size(i) == 1, op, ": ", name, " must broadcast to [B, H, T, S]");
      stride[i] = x.size(i) == 1 ? 0 : x.stride(i);
    }
    return {x.data_ptr(), stride[0], stride[1], stride[2], stride[3], x_type};
  }
  bool has_heads() const { return a.B > 0 && a.H > 0; }
};

std::tuple<Tensor, Tensor> attention_forward(Tensor q, Tensor k, Tensor v, MaybeTensor mask, MaybeTensor bias,
                                             MaybeTensor alibi_slopes, MaybeTensor sink, MaybeTensor seed, double scale,
                                             double softcap, int64_t q_offset, int64_t window_left,
                                             int64_t window_right, double dropout_p) {
  AttentionCall call(
      "attention_fwd", q, k, v,
      {mask, bias, alibi_slopes, sink, seed, scale, softcap, q_offset, window_left, window_right, dropout_p});
  Attention& a = call.a;
  const Tensor o = new_heads(q, a.Dv), lse = empty(q, {a.B, a.H, a.T}, ScalarType::Double);
  a.o = heads(o);
  a.lse = (double*)lse.data_ptr();
  if (call.has_heads() && a.T) {
    const OnDeviceOf device(q);
    check(attention_fwd(call.type, a, device.stream()), call.op);
  }
  return {o, lse};
}

// The gradient of the scores, summed over the dimensions along which the bias was broadcast.
Tensor sum_to_bias(const Tensor& dscores, const Tensor& bias) {
  std::vector<int64_t> dims;
  for (int64_t i = 0; i < 4; ++i)
    if (bias.size(i) != dscores.size(i)) dims.push_back(i);
  const Tensor sum = dims.empty() ? dscores : torch::stable::sum(dscores, {{dims.data(), dims.size()}}, true);
  return sum.scalar_type() == bias.scalar_type() ? sum : torch::stable::to(sum, bias.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_o, MaybeTensor dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, MaybeTensor mask,
    MaybeTensor bias, MaybeTensor alibi_slopes, MaybeTensor sink, MaybeTensor seed, double scale, double softcap,
    int64_t q_offset, int64_t window_left, int64_t window_right, double dropout_p, bool bias_grad,
    bool /*partial: delta comes from o here, so all keys or some are the same*/) {
  AttentionCall call(
      "attention_bwd", q, k, v,
      {mask, bias, alibi_slopes, sink, seed, scale, softcap, q_offset, window_left, window_right, dropout_p});
  Attention& a = call.a;
  for (const Tensor& x : {grad_o, o})
    STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == a.B && x.size(1) == a.H && x.size(2) == a.T && x.size(3) == a.Dv,
                    call.op, ": o and its gradient must have q's shape with v's head size");
  STD_TORCH_CHECK(lse.is_contiguous() && lse.numel() == int64_t(a.B) * a.H * a.T &&
                      lse.scalar_type() == ScalarType::Double && (!dlse || dlse->scalar_type() == ScalarType::Double),
                  call.op, ": lse must be contiguous float64, one number per query and head, and its gradient too");
  const Tensor grad = readable(grad_o, call.type, call.op, "grad_o"), out = readable(o, call.type, call.op, "o");
  const MaybeTensor grad_lse = contiguous_vector(dlse, lse.numel(), call.op, "dlse");
  const Tensor dq = new_heads(q, a.D), dk = new_heads(k, a.D), dv = new_heads(v, a.Dv);
  const Tensor rows = empty(q, {a.B, a.H, a.T, 2}, ScalarType::Float);
  a.grad_o = heads(grad), a.o = heads(out), a.dq = heads(dq), a.dk = heads(dk), a.dv = heads(dv);
  a.lse = (double*)lse.data_ptr();
  a.dlse = (const double*)data(grad_lse);
  a.rows = (QueryRow*)rows.data_ptr();

  const bool wants_bias = bias && bias_grad;
  Tensor dscores = none_like(bias ? *bias : q);
  if (wants_bias) {  // blocks outside the window are never visited: they stay 0
    const bool whole = bias->numel() == int64_t(a.B) * a.H * a.T * a.S && bias->scalar_type() == q.scalar_type();
    dscores = empty(q, {a.B, a.H, a.T, a.S}, whole ? q.scalar_type() : ScalarType::Float);
    torch::stable::zero_(dscores);
    a.dbias = call.pairs(dscores, "dbias", whole ? call.type : kFloat);
  }
  Tensor dsink = none_like(q);
  if (sink) {
    dsink = empty(q, {a.H}, call.sink->scalar_type());
    a.dsink = dsink.data_ptr();
  }
  if (call.has_heads()) {
    const OnDeviceOf device(q);
    check(attention_bwd(call.type, a, device.stream()), call.op);
  }
  if (sink && dsink.scalar_type() != sink->scalar_type()) dsink = torch::stable::to(dsink, sink->scalar_type());
  return {dq, dk, dv, wants_bias ? sum_to_bias(dscores, *bias) : dscores, dsink};
}

}  // namespace
}  // namespace fastllm::cuda

STABLE_TORCH_LIBRARY_IMPL(fastllm_cuda, FASTLLM_CUDA_DEVICE, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&fastllm::cuda::layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&fastllm::cuda::layer_norm_bwd));
  m.impl("rms_norm_fwd", TORCH_BOX(&fastllm::cuda::rms_norm_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&fastllm::cuda::rms_norm_bwd));
  m.impl("softmax_fwd", TORCH_BOX(&fastllm::cuda::softmax_forward));
  m.impl("softmax_bwd", TORCH_BOX(&fastllm::cuda::softmax_backward));
  m.impl("cross_entropy_fwd", TORCH_BOX(&fastllm::cuda::cross_entropy_forward));
  m.impl("cross_entropy_bwd", TORCH_BOX(&fastllm::cuda::cross_entropy_backward));
  m.impl("attention_fwd", TORCH_BOX(&fastllm::cuda::attention_forward));
  m.impl("attention_bwd", TORCH_BOX(&fastllm::cuda::attention_backward));
}
