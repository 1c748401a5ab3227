// Tensors in, checks, launch: the GPU kernels of rows as fastllm_cuda::<op>, in the calling convention of fastllm/ops/.
#include "cuda/bindings.h"

namespace fastllm::cuda {
namespace {

struct Rows {
  int64_t N, D;
  std::vector<int64_t> shape, leading;

  Rows(const Tensor& x, const char* op) : shape(shape_of(x)) {
    CHECK(!shape.empty() && shape.back() > 0 && x.is_contiguous(), op, ": x must be contiguous [..., D] with D >= 1");
    D = shape.back();
    N = x.numel() / D;
    leading.assign(shape.begin(), shape.end() - 1);
  }
};
void check_like(const Tensor& got, const Tensor& like, const char* op, const char* name) {
  CHECK(got.is_contiguous() && got.numel() == like.numel() && got.scalar_type() == like.scalar_type(), op, ": ", name,
        " must be contiguous, with the shape and dtype of x");
}
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
  CHECK(rstd.numel() == r.N && (!mean || mean->numel() == r.N), op, ": mean and rstd must have one number per row");
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
  CHECK(dropout_p == 0, op, ": the CUDA C++ kernels have no dropout");
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
  CHECK(x.dim() == 4 && x.is_contiguous(), op, ": x must be contiguous [B, H, T, S]");
  Softmax a{};
  a.H = x.size(1), a.T = x.size(2), a.S = x.size(3);
  a.scale = float(scale), a.causal = causal, a.log = log;
  a.x = x.data_ptr();
  if (mask) {
    CHECK(mask->dim() == 4 && mask->scalar_type() == ScalarType::Bool, op, ": mask must be 4-D bool");
    for (int i = 0; i < 4; ++i) {
      CHECK(mask->size(i) == x.size(i) || mask->size(i) == 1, op, ": mask must broadcast to x");
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
  CHECK(y.dim() >= 1 && y.is_contiguous(), op, ": y must be contiguous [..., S]");
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

constexpr int64_t kNone = 0, kMean = 1;  // of the reductions; 2 is the sum

// A call of cross-entropy in the kernels' terms, and the tensors that it needed.
struct LossCall {
  const char* op;
  CrossEntropy a{};
  MaybeTensor weight, grad;
  Tensor sums;

  LossCall(const char* op, const Tensor& x, const Tensor& target, const MaybeTensor& weight_in, int64_t ignore_index,
           double label_smoothing, double softcap, double z_loss)
      : op(op), sums(empty(x, {3}, ScalarType::Double)) {
    CHECK(x.dim() == 2 && x.size(1) > 0 && x.is_contiguous(), op, ": x must be contiguous [N, V]");
    take_targets(target, weight_in, x.size(1), ignore_index);
    CHECK(a.N == x.size(0), op, ": target must have a number per row of x");
    a.x = x.data_ptr();
    a.label_smoothing = float(label_smoothing), a.softcap = float(softcap), a.z_loss = float(z_loss);
    if (weight && label_smoothing > 0) a.weight_sum = (double*)sums.data_ptr() + 2;
  }
  // Without logits: for the sums over targets alone.
  LossCall(const char* op, const Tensor& target, const MaybeTensor& weight_in, int64_t V, int64_t ignore_index)
      : op(op), sums(empty(target, {2}, ScalarType::Double)) {
    take_targets(target, weight_in, V, ignore_index);
    take_mean();
  }

  void take_targets(const Tensor& target, const MaybeTensor& weight_in, int64_t V, int64_t ignore_index) {
    CHECK(target.scalar_type() == ScalarType::Long && target.is_contiguous(), op,
          ": target must be contiguous int64 [N]");
    weight = contiguous_vector(at_most_float(weight_in), V, op, "weight");
    a.N = target.numel(), a.V = V;
    a.target = (const int64_t*)target.data_ptr();
    a.weight = vector(weight, op);
    a.ignore_index = ignore_index;
  }
  void take_mean() { a.total = (double*)sums.data_ptr(); }
  void take_gradient(const Tensor& dloss, bool per_row) {
    a.dloss_per_row = per_row;
    grad = contiguous_vector(at_most_float(dloss), per_row ? a.N : 1, op, "dloss");
    a.dloss = vector(grad, op);
  }
};

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(Tensor x, Tensor target, MaybeTensor weight,
                                                         int64_t ignore_index, int64_t reduction,
                                                         double label_smoothing, double softcap, double z_loss,
                                                         bool accuracy) {
  LossCall call("cross_entropy_fwd", x, target, weight, ignore_index, label_smoothing, softcap, z_loss);
  if (reduction == kMean) call.take_mean();
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
    check(cross_entropy_fwd(type_of(x, call.op), a, reduced, device.stream()), call.op);
  }
  return {loss, lse, right};
}

Tensor cross_entropy_backward(Tensor dloss, Tensor x, Tensor target, MaybeTensor weight, Tensor lse,
                              int64_t ignore_index, int64_t reduction, double label_smoothing, double softcap,
                              double z_loss) {
  LossCall call("cross_entropy_bwd", x, target, weight, ignore_index, label_smoothing, softcap, z_loss);
  if (reduction == kMean) call.take_mean();
  CrossEntropy& a = call.a;
  CHECK(lse.is_contiguous() && lse.numel() == a.N && lse.scalar_type() == ScalarType::Double, call.op,
        ": lse must be contiguous float64 [N]");
  call.take_gradient(dloss, reduction == kNone);
  a.lse = (double*)lse.data_ptr();
  const Tensor dx = empty(x, {a.N, a.V}, x.scalar_type());
  a.dx = dx.data_ptr();
  if (a.N) {
    const OnDeviceOf device(x);
    check(cross_entropy_bwd(type_of(x, call.op), a, device.stream()), call.op);
  }
  return dx;
}

Tensor cross_entropy_totals(Tensor target, MaybeTensor weight, int64_t classes, int64_t ignore_index) {
  const LossCall call("cross_entropy_total", target, weight, classes, ignore_index);
  const OnDeviceOf device(target);
  check(cross_entropy_total(call.a, device.stream()), call.op);
  return call.sums;
}

// The rows' losses; x becomes their gradient where that of the loss is given.
std::tuple<Tensor, Tensor> cross_entropy_of_rows(Tensor x, Tensor target, MaybeTensor weight, MaybeTensor total,
                                                 MaybeTensor dloss, int64_t ignore_index, double label_smoothing,
                                                 double softcap, double z_loss, bool accuracy) {
  LossCall call("cross_entropy_rows", x, target, weight, ignore_index, label_smoothing, softcap, z_loss);
  CrossEntropy& a = call.a;
  CHECK(!total || (total->is_contiguous() && total->numel() == 2 && total->scalar_type() == ScalarType::Double),
        call.op, ": total must be contiguous float64 [2]");
  a.total = total ? (double*)total->data_ptr() : nullptr;
  const Tensor loss = empty(x, {a.N}, ScalarType::Double), right = empty(x, {accuracy ? a.N : 0}, ScalarType::Bool);
  a.row_loss = (double*)loss.data_ptr();
  a.right = accuracy ? (bool*)right.data_ptr() : nullptr;
  if (dloss) {
    call.take_gradient(*dloss, dloss->dim() > 0);
    a.dx = x.data_ptr();
  }
  if (a.N) {
    const OnDeviceOf device(x);
    check(cross_entropy_rows(type_of(x, call.op), a, device.stream()), call.op);
  }
  return {loss, right};
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
  m.impl("cross_entropy_total", TORCH_BOX(&fastllm::cuda::cross_entropy_totals));
  m.impl("cross_entropy_rows", TORCH_BOX(&fastllm::cuda::cross_entropy_of_rows));
}
