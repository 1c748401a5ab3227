// Tensors in, checks, threads, table call: attention.
#include "cpu/attention_problem.h"

namespace fastllm::cpu {
namespace {

void check_grad_o(const char* op, const Attention& a, const Tensor& grad_o, const Tensor& o, const Tensor& lse) {
  for (const Tensor& x : {grad_o, o})
    CHECK(x.dim() == 4 && x.size(0) == a.B && x.size(1) == a.H && x.size(2) == a.T && x.size(3) == a.Dv, op,
          ": o and its gradient must have q's shape with v's head size");
  CHECK(lse.is_contiguous() && lse.numel() == a.B * a.H * a.T && lse.scalar_type() == ScalarType::Double, op,
        ": lse must be contiguous float64, one number per query and head");
}
MaybeTensor flat_dlse(const char* op, const MaybeTensor& dlse, const Tensor& lse) {
  if (!dlse) return {};
  CHECK(dlse->numel() == lse.numel() && dlse->scalar_type() == ScalarType::Double, op, ": dlse must be like lse");
  return torch::stable::contiguous(*dlse);
}

// Whether some scores are never computed, so that nobody writes their bias's gradient.
bool bias_skips(const Attention& a) { return a.mask.data || a.left >= 0 || a.right >= 0; }

// Too few items for the threads: the keys are cut into ranges, whose dq are summed afterwards.
int64_t ranges_for_threads(const Attention& a, int64_t items, bool threads) {
  const int64_t wanted = threads ? 2 * torch::stable::get_num_threads() : 1;
  const bool one_range = a.dbias.data && a.dbias.s == 0;  // a sum over all keys has one owner
  if (items == 0 || items >= wanted || wanted == 2 || one_range) return 1;
  return std::max<int64_t>(1, std::min(a.S / 96, (wanted + items - 1) / items));
}

// The sink's gradient: the sum of what batch entries and ranges of keys add, [n, H].
Tensor sum_sink(const char* op, const Tensor& partial, const Tensor& sink) {
  const int64_t n = partial.size(0), H = partial.size(1);
  const Tensor dsink = empty({H}, sink.scalar_type());
  for (int64_t h = 0; h < H; ++h) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += ((const double*)partial.data_ptr())[i * H + h];
    set_element(dsink.data_ptr(), type_of(dsink, op), h, total);
  }
  return dsink;
}

}  // namespace

std::tuple<Tensor, Tensor> attention_fwd(Tensor q, Tensor k, Tensor v, MaybeTensor mask, MaybeTensor bias,
                                         MaybeTensor alibi_slopes, MaybeTensor sink, MaybeTensor seed, double scale,
                                         double softcap, int64_t q_offset, int64_t window_left, int64_t window_right,
                                         double dropout_p) {
  const char* op = "attention_fwd";
  Problem problem(
      op, q, k, v,
      {mask, bias, alibi_slopes, sink, seed, scale, softcap, q_offset, window_left, window_right, dropout_p},
      q.size(0));
  Attention& a = problem.a;
  const Type t = problem.type;
  const Tensor o = new_heads(q, a.Dv), lse = empty({a.B, a.H, a.T}, ScalarType::Double);
  a.o = heads(o, op, "o", t);
  a.lse = (double*)lse.data_ptr();
  a.lse_b = a.H * a.T, a.lse_h = a.T;
  std::vector<Attention> parts{a};
  attend(parts, t);
  return {o, lse};
}

Tensor attention_plain(Tensor q, Tensor k, Tensor v, double scale, int64_t q_offset, int64_t window_left,
                       int64_t window_right) {
  const char* op = "attention_plain";
  const MaybeTensor none;
  Problem problem(op, q, k, v, {none, none, none, none, none, scale, 0, q_offset, window_left, window_right, 0},
                  q.size(0));
  const Tensor o = new_heads(q, problem.a.Dv);
  problem.a.o = heads(o, op, "o", problem.type);
  std::vector<Attention> parts{problem.a};
  attend(parts, problem.type);
  return o;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(
    Tensor grad_o, MaybeTensor dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, MaybeTensor mask,
    MaybeTensor bias, MaybeTensor alibi_slopes, MaybeTensor sink, MaybeTensor seed, double scale, double softcap,
    int64_t q_offset, int64_t window_left, int64_t window_right, double dropout_p, bool bias_grad, bool partial) {
  const char* op = "attention_bwd";
  Problem problem(
      op, q, k, v,
      {mask, bias, alibi_slopes, sink, seed, scale, softcap, q_offset, window_left, window_right, dropout_p},
      q.size(0));
  Attention& a = problem.a;
  const Type t = problem.type;
  const ScalarType compute = compute_type(t);
  check_grad_o(op, a, grad_o, o, lse);
  a.grad_o = heads(grad_o, op, "grad_o", t), a.o = heads(o, op, "o", t);
  a.lse = (double*)lse.data_ptr();
  a.lse_b = a.H * a.T, a.lse_h = a.T;
  const MaybeTensor dlse_flat = flat_dlse(op, dlse, lse);
  if (dlse_flat) a.dlse = (const double*)dlse_flat->data_ptr();
  a.partial_keys = partial;
  const Tensor dq = new_heads(q, a.D), dk = new_heads(k, a.D), dv = new_heads(v, a.Dv);
  a.dq = heads(dq, op, "dq", t), a.dk = heads(dk, op, "dk", t), a.dv = heads(dv, op, "dv", t);

  // A bias that is broadcast collects many scores in an element: in double. Otherwise the compute type will do.
  Tensor dbias = none_like(bias ? *bias : q), dbias_sum = dbias;
  if (bias && bias_grad) {
    const bool shared = bias->numel() < a.B * a.H * a.T * a.S;
    const ScalarType sum_type = shared ? ScalarType::Double : compute;
    dbias_sum = empty(shape_of(*bias), sum_type);
    a.dbias_adds = shared || bias_skips(a);
    if (a.dbias_adds) torch::stable::zero_(dbias_sum);
    a.dbias = broadcast(dbias_sum, a, op, "bias", sum_type == ScalarType::Double ? kDouble : kFloat);
  }
  const Kernels& table = kernels();
  const bool threads = worth_threads(a);
  const int64_t ranges = table.attention_decode_bwd->ranges[t](a);
  const bool few = ranges > 0;
  a.chunks = 1;
  const int64_t items = few ? a.B * a.Hkv : table.attention_bwd->items[t](a);
  a.chunks = few ? ranges : ranges_for_threads(a, items, threads);
  Tensor dq_partial = none_like(q);
  if (a.chunks > 1) dq_partial = empty({a.B, a.H, a.chunks, a.T, a.D}, compute);
  a.dq_partial = dq_partial.data_ptr();
  const Tensor dsink_partial = empty({sink ? a.B * a.chunks : 0, a.H}, ScalarType::Double);
  if (sink) a.dsink_partial = (double*)dsink_partial.data_ptr();
  auto* bytes = few ? table.attention_decode_bwd->bytes[t] : table.attention_bwd->bytes[t];
  auto* run = few ? table.attention_decode_bwd->run[t] : table.attention_bwd->run[t];
  for_items(items * a.chunks, bytes(a), threads, [&](int64_t item, void* memory) { run(a, item, memory); });

  if (a.chunks > 1)
    for_range(a.B * a.H * a.T, 64, [&](int64_t begin, int64_t end) { table.attention_bwd->sum_dq[t](a, begin, end); });
  if (bias && bias_grad)
    dbias =
        bias->scalar_type() == dbias_sum.scalar_type() ? dbias_sum : torch::stable::to(dbias_sum, bias->scalar_type());
  return {dq, dk, dv, dbias, sink ? sum_sink(op, dsink_partial, *sink) : none_like(q)};
}

namespace {

Heads from(Heads x, int64_t t, int64_t element_bytes) {
  x.data = (char*)x.data + t * x.t * element_bytes;
  return x;
}

std::vector<int64_t> bounds(const char* op, const char* name, const Tensor& cu, int64_t total) {
  const ScalarType type = cu.scalar_type();
  CHECK(cu.dim() == 1 && cu.numel() >= 1 && cu.is_contiguous() && (type == ScalarType::Int || type == ScalarType::Long),
        op, ": ", name, " must be int32 or int64 [sequences + 1]");
  std::vector<int64_t> at(cu.numel());
  for (size_t n = 0; n < at.size(); ++n)
    at[n] = type == ScalarType::Int ? ((const int32_t*)cu.data_ptr())[n] : ((const int64_t*)cu.data_ptr())[n];
  bool rises = at[0] == 0 && at.back() <= total;
  for (size_t n = 1; n < at.size(); ++n) rises = rises && at[n - 1] <= at[n];
  CHECK(rises, op, ": ", name, " must start at 0, never fall, and end at ", total, " at most");
  return at;
}

// Packed sequences: each is a problem of its own, on its part of the same memory, that the kernels cannot tell from any
// other. `whole` is the problem of one batch entry with all tokens.
std::vector<Attention> sequences(const char* op, const Attention& whole, Type type, const Tensor& cu_q,
                                 const Tensor& cu_k, std::optional<int64_t> q_offset) {
  const std::vector<int64_t> q = bounds(op, "cu_seqlens_q", cu_q, whole.T),
                             k = bounds(op, "cu_seqlens_k", cu_k, whole.S);
  CHECK(q.size() == k.size(), op, ": cu_seqlens_q and cu_seqlens_k must have one length");
  const int64_t bytes = type == kDouble ? 8 : type == kFloat ? 4 : 2, wide = type == kDouble ? 8 : 4;
  std::vector<Attention> parts;
  for (size_t n = 0; n + 1 < q.size(); ++n) {
    Attention a = whole;
    a.T = q[n + 1] - q[n], a.S = k[n + 1] - k[n];
    a.q_offset = q_offset ? *q_offset : a.S - a.T;
    for (Heads* x : {&a.q, &a.o, &a.grad_o, &a.dq}) *x = from(*x, q[n], bytes);
    for (Heads* x : {&a.k, &a.v, &a.dk, &a.dv}) *x = from(*x, k[n], bytes);
    a.lse += q[n];
    if (a.dlse) a.dlse += q[n];
    if (a.alibi_stride_b) a.alibi_slopes = (const char*)a.alibi_slopes + n * a.H * wide;
    a.first_head = int64_t(n) * a.H;
    parts.push_back(a);
  }
  return parts;
}

// [total, H, D] as [1, H, total, D].
Tensor as_batch(const Tensor& x, const char* op) {
  CHECK(x.dim() == 3, op, ": q, k and v must be [total, H, D]");
  return torch::stable::transpose(torch::stable::unsqueeze(x, 0), 1, 2);
}
// A new [total, H, D], zero where sequences may not reach.
Tensor new_packed(const Tensor& like, int64_t D) {
  Tensor x = empty({like.size(0), like.size(1), D}, like.scalar_type());
  torch::stable::zero_(x);
  return x;
}

}  // namespace

std::tuple<Tensor, Tensor> attention_varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                                                MaybeTensor alibi_slopes, MaybeTensor sink, MaybeTensor seed,
                                                double scale, double softcap, std::optional<int64_t> q_offset,
                                                int64_t window_left, int64_t window_right, double dropout_p) {
  const char* op = "attention_varlen_fwd";
  const MaybeTensor none;
  Problem problem(op, as_batch(q, op), as_batch(k, op), as_batch(v, op),
                  {none, none, alibi_slopes, sink, seed, scale, softcap, q_offset.value_or(0), window_left,
                   window_right, dropout_p},
                  cu_seqlens_q.numel() - 1);
  const Type t = problem.type;
  const Tensor o = new_packed(q, v.size(2));
  Tensor lse = empty({q.size(1), q.size(0)}, ScalarType::Double);
  torch::stable::fill_(lse, -INFINITY);
  problem.a.o = heads(as_batch(o, op), op, "o", t);
  problem.a.lse = (double*)lse.data_ptr();
  problem.a.lse_h = q.size(0);
  std::vector<Attention> parts = sequences(op, problem.a, t, cu_seqlens_q, cu_seqlens_k, q_offset);
  attend(parts, t);
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_varlen_bwd(
    Tensor grad_o, MaybeTensor dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor cu_seqlens_q,
    Tensor cu_seqlens_k, MaybeTensor alibi_slopes, MaybeTensor sink, MaybeTensor seed, double scale, double softcap,
    std::optional<int64_t> q_offset, int64_t window_left, int64_t window_right, double dropout_p) {
  const char* op = "attention_varlen_bwd";
  const MaybeTensor none;
  const int64_t N = cu_seqlens_q.numel() - 1;
  Problem problem(op, as_batch(q, op), as_batch(k, op), as_batch(v, op),
                  {none, none, alibi_slopes, sink, seed, scale, softcap, q_offset.value_or(0), window_left,
                   window_right, dropout_p},
                  N);
  Attention& a = problem.a;
  const Type t = problem.type;
  check_grad_o(op, a, as_batch(grad_o, op), as_batch(o, op), lse);
  a.grad_o = heads(as_batch(grad_o, op), op, "grad_o", t), a.o = heads(as_batch(o, op), op, "o", t);
  a.lse = (double*)lse.data_ptr();
  a.lse_h = q.size(0);
  const MaybeTensor dlse_flat = flat_dlse(op, dlse, lse);
  if (dlse_flat) a.dlse = (const double*)dlse_flat->data_ptr();
  const Tensor dq = new_packed(q, a.D), dk = new_packed(k, a.D), dv = new_packed(v, a.Dv);
  a.dq = heads(as_batch(dq, op), op, "dq", t);
  a.dk = heads(as_batch(dk, op), op, "dk", t), a.dv = heads(as_batch(dv, op), op, "dv", t);
  std::vector<Attention> parts = sequences(op, a, t, cu_seqlens_q, cu_seqlens_k, q_offset);
  const int64_t threads = torch::stable::get_num_threads();
  int64_t partial = 0;
  for (Attention& part : parts) {  // few sequences: cut the keys of each into ranges, as for a batch
    part.chunks = N * a.Hkv >= 2 * threads ? 1 : std::max<int64_t>(1, std::min(part.S / 96, 2 * threads));
    partial += part.chunks > 1 ? part.H * part.chunks * part.T * part.D : 0;
  }
  const Tensor dq_partial = empty({partial}, compute_type(t));
  int64_t ranges = 0;
  for (const Attention& part : parts) ranges += part.chunks;
  Tensor dsink_partial = empty({sink ? ranges : 0, a.H}, ScalarType::Double);
  torch::stable::zero_(dsink_partial);  // a sequence may have no queries
  partial = ranges = 0;
  for (Attention& part : parts) {
    part.dq_partial = (char*)dq_partial.data_ptr() + partial * (t == kDouble ? 8 : 4);
    if (sink) part.dsink_partial = (double*)dsink_partial.data_ptr() + ranges * a.H;
    partial += part.chunks > 1 ? part.H * part.chunks * part.T * part.D : 0, ranges += part.chunks;
  }
  const Kernels& table = kernels();
  for_parts(parts, table.attention_bwd->items[t], table.attention_bwd->bytes[t], table.attention_bwd->run[t]);
  for (const Attention& part : parts)
    if (part.chunks > 1)
      for_range(part.H * part.T, 64,
                [&](int64_t begin, int64_t end) { table.attention_bwd->sum_dq[t](part, begin, end); });
  return {dq, dk, dv, sink ? sum_sink(op, dsink_partial, *sink) : none_like(q)};
}

}  // namespace fastllm::cpu
