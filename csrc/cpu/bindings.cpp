// Tensors in, checks, threads, table call: norms and softmax. Attention's are in attention_bindings.cpp.
#include "cpu/tensors.h"

namespace fastllm::cpu {

bool poison_fresh_memory = false;

namespace {

struct Rows {
  int64_t N, D;
  std::vector<int64_t> shape, leading;
};
Rows rows_of(const Tensor& x, const char* op) {
  Rows r;
  r.shape = shape_of(x);
  CHECK(!r.shape.empty() && r.shape.back() > 0 && x.is_contiguous(), op, ": x must be contiguous [..., D] with D >= 1");
  r.D = r.shape.back();
  r.N = x.numel() / r.D;
  r.leading.assign(r.shape.begin(), r.shape.end() - 1);
  return r;
}
template <class Kernel>
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_fwd(const char* op, Kernel kernel, const Tensor& x,
                                                    const MaybeTensor& weight, const MaybeTensor& bias,
                                                    const MaybeTensor& residual, const MaybeTensor& seed, double eps,
                                                    double weight_offset, double dropout_p, bool has_mean,
                                                    bool statistics = true) {
  const Rows r = rows_of(x, op);
  if (residual) check_like(*residual, x, op, "residual");
  check_weight(weight, r.D, op, "weight");
  check_weight(bias, r.D, op, "bias");
  const Type t = type_of(x, op);
  const InComputeType w(weight, t, op), b(bias, t, op);
  const bool sum = residual || dropout_p > 0;
  const Tensor y = empty(r.shape, x.scalar_type());
  const Tensor h = sum ? empty(r.shape, x.scalar_type()) : statistics ? none_like(x) : y;
  const Tensor rstd = statistics ? empty(r.leading, compute_type(t)) : h;
  const Tensor mean = statistics && has_mean ? empty(r.leading, compute_type(t)) : h;
  Norm a{};
  a.D = r.D;
  a.eps = eps;
  a.weight_offset = weight_offset;
  a.x = x.data_ptr();
  a.residual = residual ? residual->data_ptr() : nullptr;
  a.dropout_p = dropout_p;
  if (dropout_p > 0) a.seed = seed_of(seed, op);
  a.y = y.data_ptr();
  a.stream = streams(y, r.D);
  a.h = sum ? h.data_ptr() : nullptr;
  a.weight = w.data();
  a.bias = b.data();
  a.mean = statistics && has_mean ? mean.data_ptr() : nullptr;
  a.rstd = statistics ? rstd.data_ptr() : nullptr;
  for_range(r.N, kGrain / r.D + 1, [&](int64_t begin, int64_t end) { kernel[t](a, begin, end); });
  return {y, h, mean, rstd};
}

// dx, dresidual (empty where it would be dx), dweight, dbias.
template <class Kernel>
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_bwd(const char* op, Kernel kernel, const Tensor& dy,
                                                    const MaybeTensor& dh, const Tensor& h, const MaybeTensor& weight,
                                                    const void* mean, const Tensor& rstd, const MaybeTensor& seed,
                                                    double weight_offset, double dropout_p, bool has_bias,
                                                    bool has_residual) {
  const Rows r = rows_of(h, op);
  check_like(dy, h, op, "dy");
  if (dh) check_like(*dh, h, op, "dh");
  check_weight(weight, r.D, op, "weight");
  CHECK(rstd.numel() == r.N, op, ": rstd must have a number per row");
  const Type t = type_of(h, op), compute = t == kDouble ? kDouble : kFloat;
  const InComputeType w(weight, t, op);
  const bool two = has_residual && dropout_p > 0;
  const Tensor dx = empty(r.shape, h.scalar_type());
  const Tensor dresidual = two ? empty(r.shape, h.scalar_type()) : none_like(h);
  const Tensor dweight = weight ? empty(shape_of(*weight), weight->scalar_type()) : none_like(h);
  const Tensor dbias = empty({has_bias ? r.D : 0}, compute_type(t));

  const int64_t stripes = stripes_of(r.N), bytes = bytes_of(compute);
  std::unique_ptr<char[]> partial(new char[stripes * r.D * bytes * ((weight ? 1 : 0) + (has_bias ? 1 : 0)) + 1]);
  Norm a{};
  a.D = r.D;
  a.weight_offset = weight_offset;
  a.h = const_cast<void*>(h.data_ptr());
  a.weight = w.data();
  a.mean = const_cast<void*>(mean);
  a.rstd = rstd.data_ptr();
  a.dropout_p = dropout_p;
  if (dropout_p > 0) a.seed = seed_of(seed, op);
  a.dy = dy.data_ptr();
  a.dh = dh ? dh->data_ptr() : nullptr;
  a.dx = dx.data_ptr();
  a.stream = streams(dx, r.D);
  a.dresidual = two ? dresidual.data_ptr() : nullptr;
  a.dweight = weight ? partial.get() : nullptr;
  a.dbias = has_bias ? partial.get() + (weight ? stripes * r.D * bytes : 0) : nullptr;
  for_stripes(r.N, r.D, [&](int64_t stripe, int64_t begin, int64_t end) { kernel[t](a, stripe, begin, end); });
  if (weight) sum_stripes(a.dweight, compute, stripes, r.D, dweight, op);
  if (has_bias) sum_stripes(a.dbias, compute, stripes, r.D, dbias, op);
  return {dx, dresidual, dweight, dbias};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_fwd(Tensor x, MaybeTensor weight, MaybeTensor bias,
                                                          MaybeTensor residual, MaybeTensor seed, double eps,
                                                          double dropout_p) {
  return norm_fwd("layer_norm_fwd", kernels().norm->layer_norm_fwd, x, weight, bias, residual, seed, eps, 0.0,
                  dropout_p, true);
}

Tensor layer_norm_plain(Tensor x, MaybeTensor weight, MaybeTensor bias, double eps) {
  const MaybeTensor none;
  return std::get<0>(norm_fwd("layer_norm_plain", kernels().norm->layer_norm_fwd, x, weight, bias, none, none, eps, 0.0,
                              0.0, true, false));
}

Tensor rms_norm_plain(Tensor x, MaybeTensor weight, double eps, double weight_offset) {
  const MaybeTensor none;
  return std::get<0>(norm_fwd("rms_norm_plain", kernels().norm->rms_norm_fwd, x, weight, none, none, none, eps,
                              weight_offset, 0.0, false, false));
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_fwd(Tensor x, MaybeTensor weight, MaybeTensor residual, MaybeTensor seed,
                                                double eps, double weight_offset, double dropout_p) {
  auto [y, h, none, rstd] = norm_fwd("rms_norm_fwd", kernels().norm->rms_norm_fwd, x, weight, MaybeTensor(), residual,
                                     seed, eps, weight_offset, dropout_p, false);
  return {y, h, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_bwd(Tensor dy, MaybeTensor dh, Tensor h, MaybeTensor weight,
                                                          Tensor mean, Tensor rstd, MaybeTensor seed, double dropout_p,
                                                          bool has_bias, bool has_residual) {
  CHECK(mean.numel() == rstd.numel(), "layer_norm_bwd: mean must have a number per row");
  return norm_bwd("layer_norm_bwd", kernels().norm->layer_norm_bwd, dy, dh, h, weight, mean.data_ptr(), rstd, seed, 0.0,
                  dropout_p, has_bias, has_residual);
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_bwd(Tensor dy, MaybeTensor dh, Tensor h, MaybeTensor weight, Tensor rstd,
                                                MaybeTensor seed, double weight_offset, double dropout_p,
                                                bool has_residual) {
  auto [dx, dresidual, dweight, none] = norm_bwd("rms_norm_bwd", kernels().norm->rms_norm_bwd, dy, dh, h, weight,
                                                 nullptr, rstd, seed, weight_offset, dropout_p, false, has_residual);
  return {dx, dresidual, dweight};
}

Tensor softmax_fwd(Tensor x, MaybeTensor mask, double scale, bool causal, bool log) {
  const bool plain = !mask && !causal && x.dim() >= 1;  // then the rows are all alike, whatever leads to them
  CHECK((plain || x.dim() == 4) && x.is_contiguous(), "softmax_fwd: x must be contiguous [B, H, T, S]");
  const Type t = type_of(x, "softmax_fwd");
  Softmax a{};
  a.H = plain ? 1 : x.size(1), a.T = plain ? 1 : x.size(2), a.S = x.size(-1);
  a.scale = scale;
  a.causal = causal, a.log = log;
  a.x = x.data_ptr();
  if (mask) {
    CHECK(mask->dim() == 4 && mask->scalar_type() == ScalarType::Bool, "softmax_fwd: mask must be 4-D bool");
    for (int i = 0; i < 4; ++i) {
      CHECK(mask->size(i) == x.size(i) || mask->size(i) == 1, "softmax_fwd: mask must broadcast to x");
      a.mask_stride[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
    }
    a.mask = (const uint8_t*)mask->data_ptr();
  }
  const Tensor y = empty(shape_of(x), x.scalar_type());
  a.y = y.data_ptr();
  a.stream = !causal && streams(y, a.S);
  const int64_t rows = a.S ? x.numel() / a.S : 0, bytes = (a.S + 32) * (t == kDouble ? 8 : 4);
  const auto kernel = kernels().softmax->fwd[t];
  if (rows && a.S)
    for_range(rows, kGrain / a.S + 1, [&](int64_t begin, int64_t end) { kernel(a, begin, end, workspace(bytes)); });
  return y;
}

Tensor softmax_bwd(Tensor dy, Tensor y, double scale, bool log) {
  CHECK(y.dim() >= 1 && y.is_contiguous(), "softmax_bwd: y must be contiguous [..., S]");
  check_like(dy, y, "softmax_bwd", "dy");
  const Type t = type_of(y, "softmax_bwd");
  Softmax a{};
  a.S = y.size(-1);
  a.scale = scale;
  a.log = log;
  a.y = y.data_ptr();
  a.dy = dy.data_ptr();
  const Tensor dx = empty(shape_of(y), y.scalar_type());
  a.dx = dx.data_ptr();
  a.stream = streams(dx, a.S);
  const int64_t rows = a.S ? y.numel() / a.S : 0;
  const auto kernel = kernels().softmax->bwd[t];
  if (rows) for_range(rows, kGrain / a.S + 1, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return dx;
}

}  // namespace fastllm::cpu
