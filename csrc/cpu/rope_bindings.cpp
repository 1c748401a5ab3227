// Tensors in, checks, threads, table call: rotary positions.
#include "cpu/tensors.h"

namespace fastllm::cpu {
namespace {

constexpr const char* kOp = "rope_fwd";

Heads heads_of(const Tensor& x) { return {const_cast<void*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2), 1}; }

const int64_t* positions(const MaybeTensor& x, const char* name) {
  if (!x) return nullptr;
  CHECK(x->dim() == 1 && x->is_contiguous() && x->scalar_type() == ScalarType::Long, kOp, ": ", name,
        " must be a contiguous int64 vector");
  return (const int64_t*)x->data_ptr();
}

// Every position has a row in the tables of S rows.
void check_positions(const Rope& a, int64_t S) {
  const int64_t sequences = a.cu_seqlens ? a.sequences : a.B;
  for (int64_t i = 0; i < sequences; ++i) {
    const int64_t length = a.cu_seqlens ? a.cu_seqlens[i + 1] - a.cu_seqlens[i] : a.T;
    const int64_t first = a.offset + (a.offsets ? a.offsets[i] : 0);
    CHECK(length >= 0 && (length == 0 || (first >= 0 && first + length <= S)), kOp, ": positions ", first, " to ",
          first + length - 1, " of sequence ", i, " are outside the tables of ", S, " positions");
  }
  CHECK(!a.cu_seqlens || (a.cu_seqlens[0] == 0 && a.cu_seqlens[sequences] == a.T), kOp,
        ": cu_seqlens must go from 0 to the number of positions, ", a.T);
}

}  // namespace

std::tuple<Tensor, Tensor> rope_fwd(Tensor q, MaybeTensor k, Tensor cos, Tensor sin, MaybeTensor offsets,
                                    MaybeTensor cu_seqlens, int64_t offset, bool interleaved, bool whole,
                                    bool inverse) {
  auto dense = [](const Tensor& x) { return x.dim() == 4 && (x.stride(3) == 1 || x.numel() == 0); };
  CHECK(dense(q) && (!k || dense(*k)), kOp, ": q and k must be [B, H, T, D] with dense rows");
  const Type t = type_of(q, kOp);
  Rope a{};
  a.B = q.size(0), a.H = q.size(1), a.T = q.size(2), a.D = q.size(3);
  CHECK(!k || (k->size(0) == a.B && k->size(2) == a.T && k->size(3) == a.D && type_of(*k, kOp) == t), kOp,
        ": k must be [B, Hkv, T, D] like q, in its dtype");
  const int64_t last = cos.dim() - 1;
  CHECK((last == 1 || (last == 2 && (cos.size(0) == a.B || cos.size(0) == 1))) && cos.is_contiguous() &&
            sin.is_contiguous() && sin.dim() == cos.dim() && sin.numel() == cos.numel() &&
            sin.size(last) == cos.size(last) && sin.scalar_type() == cos.scalar_type(),
        kOp, ": cos and sin must be contiguous [S, R / 2] or [B, S, R / 2], alike");
  a.interleaved = interleaved, a.whole = whole, a.inverse = inverse;
  a.R = cos.size(last) * (whole ? 1 : 2);
  CHECK(a.R <= a.D && a.R % 2 == 0, kOp, ": the tables rotate ", a.R, " of ", a.D, " elements");
  a.cos = cos.data_ptr(), a.sin = sin.data_ptr();
  a.table_type = type_of(cos, kOp);
  a.table_t = cos.size(last);
  a.table_b = last == 2 && cos.size(0) > 1 ? cos.size(1) * cos.size(2) : 0;
  a.offset = offset;
  a.offsets = positions(offsets, "offsets");
  a.cu_seqlens = positions(cu_seqlens, "cu_seqlens");
  a.sequences = cu_seqlens ? cu_seqlens->numel() - 1 : 0;
  CHECK(!cu_seqlens || (a.sequences >= 1 && a.B == 1), kOp, ": cu_seqlens needs B = 1 and a sequence");
  CHECK(!offsets || offsets->numel() == (cu_seqlens ? a.sequences : a.B), kOp,
        ": offsets must have one for each sequence");
  check_positions(a, cos.size(last - 1));

  const Tensor yq = new_heads(q, q.size(3)), yk = k ? new_heads(*k, k->size(3)) : none_like(q);
  a.q = heads_of(q), a.yq = heads_of(yq);
  if (k) a.Hk = k->size(1), a.k = heads_of(*k), a.yk = heads_of(yk);
  const int64_t each = (a.H + a.Hk) * a.D, bytes = 2 * a.R * (t == kDouble ? 8 : 4);
  const auto kernel = kernels().rope->rope[t];
  for_range(a.B * a.T, kGrain / std::max<int64_t>(1, each) + 1,
            [&](int64_t begin, int64_t end) { kernel(a, begin, end, workspace(bytes)); });
  return {yq, yk};
}

}  // namespace fastllm::cpu
