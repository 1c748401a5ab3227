// Tensors in, checks, threads, table call: attention.
#include "cpu/tensors.h"

namespace fastllm::cpu {
namespace {

Heads heads(const Tensor& x, const char* op, const char* name, Type t) {
  STD_TORCH_CHECK(x.dim() == 4 && type_of(x, op) == t, op, ": ", name, " must be 4-D, with the dtype of q");
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// A new [B, H, T, D] in the memory order of `like` (heads inside positions where `like` is a view of [B, T, H, D]).
Tensor new_heads(const Tensor& like, int64_t D) {
  const int64_t B = like.size(0), H = like.size(1), T = like.size(2);
  if (like.stride(1) < like.stride(2))
    return torch::stable::transpose(empty(like, {B, T, H, D}, like.scalar_type()), 1, 2);
  return empty(like, {B, H, T, D}, like.scalar_type());
}

Scores broadcast(const MaybeTensor& x, const Attention& a, const char* op, const char* name) {
  if (!x) return {};
  STD_TORCH_CHECK(x->dim() == 4, op, ": ", name, " must be 4-D");
  const int64_t full[4] = {a.B, a.H, a.T, a.S};
  int64_t stride[4];
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(x->size(i) == full[i] || x->size(i) == 1, op, ": ", name, " must broadcast to [B, H, T, S]");
    stride[i] = x->size(i) == 1 ? 0 : x->stride(i);
  }
  return {x->data_ptr(), stride[0], stride[1], stride[2], stride[3], 0};
}

Attention problem(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask, double scale,
                  int64_t q_offset, int64_t left, int64_t right) {
  const Type t = type_of(q, op);
  Attention a{};
  a.q = heads(q, op, "q", t), a.k = heads(k, op, "k", t), a.v = heads(v, op, "v", t);
  a.B = q.size(0), a.H = q.size(1), a.T = q.size(2), a.D = q.size(3);
  a.Hkv = k.size(1), a.S = k.size(2), a.Dv = v.size(3);
  STD_TORCH_CHECK(k.size(0) == a.B && v.size(0) == a.B && v.size(1) == a.Hkv && v.size(2) == a.S && k.size(3) == a.D,
                  op, ": q [B, H, T, D], k [B, Hkv, S, D] and v [B, Hkv, S, Dv] do not fit each other");
  STD_TORCH_CHECK(a.H == 0 || (a.Hkv > 0 && a.H % a.Hkv == 0), op, ": H must be a multiple of Hkv");
  STD_TORCH_CHECK(a.D > 0 && a.Dv > 0, op, ": D and Dv must be at least 1");
  a.scale = scale;
  // Positions are added to each other: beyond 2^40 a side is unbounded, and an offset makes no sense.
  constexpr int64_t kFar = int64_t(1) << 40;
  STD_TORCH_CHECK(q_offset > -kFar && q_offset < kFar, op, ": q_offset is out of range");
  a.q_offset = q_offset;
  a.left = left < kFar ? left : -1;
  a.right = right < kFar ? right : -1;
  a.mask = broadcast(mask, a, op, "mask");
  STD_TORCH_CHECK(!mask || mask->scalar_type() == ScalarType::Bool, op, ": mask must be bool");
  return a;
}

void refuse_options(const char* op, const MaybeTensor& bias, const MaybeTensor& alibi, const MaybeTensor& sink,
                    double softcap, double dropout_p) {
  STD_TORCH_CHECK(!bias && !alibi && !sink && softcap == 0.0 && dropout_p == 0.0, op,
                  ": bias, ALiBi, sink, soft-cap and dropout have no CPU kernel yet");
}

// A fork and join costs about a microsecond: as much as this many multiplications.
bool worth_threads(const Attention& a) { return double(a.B) * a.H * a.T * a.S * (a.D + a.Dv) > 100e3; }

}  // namespace

std::tuple<Tensor, Tensor> attention_fwd(Tensor q, Tensor k, Tensor v, MaybeTensor mask, MaybeTensor bias,
                                         MaybeTensor alibi_slopes, MaybeTensor sink, MaybeTensor, double scale,
                                         double softcap, int64_t q_offset, int64_t window_left, int64_t window_right,
                                         double dropout_p) {
  const char* op = "attention_fwd";
  Attention a = problem(op, q, k, v, mask, scale, q_offset, window_left, window_right);
  refuse_options(op, bias, alibi_slopes, sink, softcap, dropout_p);
  const Type t = type_of(q, op);
  const Tensor o = new_heads(q, a.Dv), lse = empty(q, {a.B, a.H, a.T}, compute_type(t));
  a.o = heads(o, op, "o", t);
  a.lse = lse.data_ptr();
  const Kernels& table = kernels();
  for_items(table.attention_fwd_items[t](a), table.attention_fwd_bytes[t](a), worth_threads(a),
            [&](int64_t item, void* memory) { table.attention_fwd[t](a, item, memory); });
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(
    Tensor grad_o, MaybeTensor dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, MaybeTensor mask,
    MaybeTensor bias, MaybeTensor alibi_slopes, MaybeTensor sink, MaybeTensor, double scale, double softcap,
    int64_t q_offset, int64_t window_left, int64_t window_right, double dropout_p) {
  const char* op = "attention_bwd";
  Attention a = problem(op, q, k, v, mask, scale, q_offset, window_left, window_right);
  refuse_options(op, bias, alibi_slopes, sink, softcap, dropout_p);
  const Type t = type_of(q, op);
  a.grad_o = heads(grad_o, op, "grad_o", t), a.o = heads(o, op, "o", t);
  for (const Tensor& x : {grad_o, o})
    STD_TORCH_CHECK(x.size(0) == a.B && x.size(1) == a.H && x.size(2) == a.T && x.size(3) == a.Dv, op,
                    ": o and its gradient must be [B, H, T, Dv]");
  STD_TORCH_CHECK(lse.is_contiguous() && lse.numel() == a.B * a.H * a.T && lse.scalar_type() == compute_type(t), op,
                  ": lse must be contiguous [B, H, T] in the compute type");
  a.lse = lse.data_ptr();
  const MaybeTensor dlse_flat = dlse ? MaybeTensor(torch::stable::contiguous(*dlse)) : MaybeTensor();
  if (dlse_flat) {
    STD_TORCH_CHECK(dlse_flat->numel() == lse.numel() && dlse_flat->scalar_type() == lse.scalar_type(), op,
                    ": dlse must be like lse");
    a.dlse = dlse_flat->data_ptr();
  }
  const Tensor dq = new_heads(q, a.D), dk = new_heads(k, a.D), dv = new_heads(v, a.Dv);
  a.dq = heads(dq, op, "dq", t), a.dk = heads(dk, op, "dk", t), a.dv = heads(dv, op, "dv", t);

  // Too few key heads for the threads: cut the keys into ranges, whose dq are summed afterwards.
  const int64_t items = a.B * a.Hkv, threads = worth_threads(a) ? torch::stable::get_num_threads() : 1;
  const int64_t most = std::max<int64_t>(1, a.S / 96);
  a.chunks = items >= 2 * threads || threads == 1 ? 1 : std::min(most, (2 * threads + items - 1) / std::max<int64_t>(items, 1));
  Tensor partial = none_like(q);
  if (a.chunks > 1) partial = empty(q, {a.B, a.H, a.chunks, a.T, a.D}, compute_type(t));
  a.dq_partial = partial.data_ptr();
  const Kernels& table = kernels();
  for_items(items * a.chunks, table.attention_bwd_bytes[t](a), threads > 1,
            [&](int64_t item, void* memory) { table.attention_bwd[t](a, item, memory); });
  if (a.chunks > 1)
    for_range(a.B * a.H * a.T, 64, [&](int64_t begin, int64_t end) { table.attention_bwd_sum_dq[t](a, begin, end); });
  return {dq, dk, dv, none_like(q), none_like(q)};
}

}  // namespace fastllm::cpu
