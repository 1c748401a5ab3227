// Tensors in, checks, launch: the GPU kernels of attention as fastllm_cuda::<op>, in the calling convention of
// fastllm/ops/.
#include "cuda/bindings.h"

namespace fastllm::cuda {
namespace {

// A tensor as attention's kernels read it: itself, or a copy where its rows are not contiguous, aligned and filled up.
Tensor readable(const Tensor& x, Type type, const char* op, const char* name) {
  CHECK(x.dim() == 4 && type_of(x, op) == type, op, ": ", name, " must be 4-D, with the dtype of q");
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
    CHECK(type != kFloat, op, ": the CUDA C++ kernels take bfloat16 and float16");
    const int64_t B = q.size(0), H = q.size(1), T = q.size(2), D = q.size(3);
    const int64_t Hkv = k.size(1), S = k.size(2), Dv = v.size(3);
    CHECK(k.size(0) == B && v.size(0) == B && v.size(1) == Hkv && v.size(2) == S && k.size(3) == D, op,
          ": q [B, H, T, D], k [B, Hkv, S, D] and v [B, Hkv, S, Dv] do not fit each other");
    CHECK(H == 0 || (Hkv > 0 && H % Hkv == 0), op, ": H must be a multiple of Hkv");
    CHECK(D > 0 && Dv > 0 && D <= kMostHeadSize && Dv <= kMostHeadSize, op, ": D and Dv must be 1 to ", kMostHeadSize);
    CHECK(!options.seed && options.dropout_p == 0, op, ": the CUDA C++ kernels have no dropout");
    constexpr int64_t kMost = int64_t(1) << 30;  // positions are added to each other in 32 bits
    CHECK(T < kMost && S < kMost && B * H * (T / 128 + 1) < 2 * kMost, op, ": too many queries or keys");
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
      CHECK(options.mask->scalar_type() == ScalarType::Bool, op, ": mask must be bool");
      a.mask = pairs(*options.mask, "mask", kFloat);
    }
    if (bias) a.bias = pairs(*bias, "bias", type_of(*bias, op));
    if (options.alibi_slopes) {
      const int64_t n = options.alibi_slopes->numel();
      CHECK(n == H || n == B * H, op, ": alibi_slopes must be [H] or [B, H]");
      slopes = contiguous_vector(at_most_float(options.alibi_slopes), n, op, "alibi_slopes");
      a.slopes = vector(slopes, op);
      a.slopes_per_batch = options.alibi_slopes->dim() == 2;
    }
    sink = contiguous_vector(at_most_float(options.sink), H, op, "sink");
    a.sink = vector(sink, op);
  }

  Pairs pairs(const Tensor& x, const char* name, Type x_type) const {
    CHECK(x.dim() == 4, op, ": ", name, " must be 4-D");
    const int64_t full[4] = {a.B, a.H, a.T, a.S};
    int64_t stride[4];
    for (int i = 0; i < 4; ++i) {
      CHECK(x.size(i) == full[i] || x.size(i) == 1, op, ": ", name, " must broadcast to [B, H, T, S]");
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
    CHECK(x.dim() == 4 && x.size(0) == a.B && x.size(1) == a.H && x.size(2) == a.T && x.size(3) == a.Dv, call.op,
          ": o and its gradient must have q's shape with v's head size");
  CHECK(lse.is_contiguous() && lse.numel() == int64_t(a.B) * a.H * a.T && lse.scalar_type() == ScalarType::Double &&
            (!dlse || dlse->scalar_type() == ScalarType::Double),
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
  m.impl("attention_fwd", TORCH_BOX(&fastllm::cuda::attention_forward));
  m.impl("attention_bwd", TORCH_BOX(&fastllm::cuda::attention_backward));
}
