// Tensors in, checks, launch: the GPU kernels as fastllm_cuda::<op>, in the calling convention of fastllm/ops/.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <dlfcn.h>

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

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_fwd(Tensor x, MaybeTensor weight, MaybeTensor bias,
                                                          MaybeTensor residual, double eps) {
  return norm_forward("layer_norm_fwd", x, weight, bias, residual, eps, 0.0, true);
}
std::tuple<Tensor, Tensor, Tensor> rms_norm_fwd(Tensor x, MaybeTensor weight, MaybeTensor residual, double eps,
                                                double weight_offset) {
  auto [y, h, none, rstd] = norm_forward("rms_norm_fwd", x, weight, {}, residual, eps, weight_offset, false);
  return {y, h, rstd};
}
std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(Tensor dy, MaybeTensor dh, Tensor h, MaybeTensor weight, Tensor mean,
                                                  Tensor rstd, bool has_bias) {
  return norm_backward("layer_norm_bwd", dy, dh, h, weight, &mean, rstd, has_bias, 0.0);
}
std::tuple<Tensor, Tensor> rms_norm_bwd(Tensor dy, MaybeTensor dh, Tensor h, MaybeTensor weight, Tensor rstd,
                                        double weight_offset) {
  auto [dx, dweight, none] = norm_backward("rms_norm_bwd", dy, dh, h, weight, nullptr, rstd, false, weight_offset);
  return {dx, dweight};
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

}  // namespace
}  // namespace fastllm::cuda

STABLE_TORCH_LIBRARY_IMPL(fastllm_cuda, FASTLLM_CUDA_DEVICE, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&fastllm::cuda::layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&fastllm::cuda::layer_norm_bwd));
  m.impl("rms_norm_fwd", TORCH_BOX(&fastllm::cuda::rms_norm_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&fastllm::cuda::rms_norm_bwd));
  m.impl("softmax_fwd", TORCH_BOX(&fastllm::cuda::softmax_forward));
  m.impl("softmax_bwd", TORCH_BOX(&fastllm::cuda::softmax_backward));
}
