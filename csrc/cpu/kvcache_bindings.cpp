// Tensors in, checks, threads, table call: attention with a cache of keys and values.
#include "cpu/attention_problem.h"

namespace fastllm::cpu {
namespace {

constexpr const char* kOp = "attention_with_kvcache";

// A small integer tensor as int64.
std::vector<int64_t> integers(const Tensor& x, const char* name) {
  const ScalarType type = x.scalar_type();
  CHECK(x.is_contiguous() && (type == ScalarType::Int || type == ScalarType::Long), kOp, ": ", name,
        " must be contiguous int32 or int64");
  std::vector<int64_t> values(x.numel());
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = type == ScalarType::Int ? ((const int32_t*)x.data_ptr())[i] : ((const int64_t*)x.data_ptr())[i];
  return values;
}

// The pages of every sequence, [B, width], and that those which hold its `length` keys exist.
std::vector<int32_t> checked_pages(const Tensor& table, const std::vector<int64_t>& lengths, int64_t page_size,
                                   int64_t pages) {
  CHECK(table.dim() == 2 && table.size(0) == int64_t(lengths.size()), kOp, ": block_table must be [B, max_pages]");
  const std::vector<int64_t> values = integers(table, "block_table");
  std::vector<int32_t> checked(values.size());
  const int64_t width = table.size(1);
  for (size_t b = 0; b < lengths.size(); ++b)
    for (int64_t i = 0; i * page_size < lengths[b]; ++i) {
      const int64_t page = values[b * width + i];
      CHECK(page >= 0 && page < pages, kOp, ": block_table[", b, ", ", i, "] must be a page in [0, ", pages, "), got ",
            page);
      checked[b * width + i] = int32_t(page);
    }
  return checked;
}

Heads batch_entry(Heads x, int64_t b, int64_t element_bytes) {
  x.data = (char*)x.data + b * x.b * element_bytes;
  return x;
}
Scores batch_entry(Scores x, int64_t b) {
  const int64_t bytes[] = {4, 2, 2, 8, 1};  // in the order of Type, then bool
  if (x.data) x.data = (char*)x.data + b * x.b * bytes[x.type];
  return x;
}

}  // namespace

std::tuple<Tensor, Tensor> attention_kvcache_fwd(Tensor q, Tensor k_cache, Tensor v_cache, MaybeTensor k_new,
                                                 MaybeTensor v_new, Tensor cache_seqlens, MaybeTensor block_table,
                                                 MaybeTensor cos, MaybeTensor sin, bool rope_interleaved,
                                                 MaybeTensor mask, MaybeTensor bias, MaybeTensor alibi_slopes,
                                                 MaybeTensor sink, double scale, double softcap,
                                                 std::optional<int64_t> q_offset, int64_t window_left,
                                                 int64_t window_right) {
  const MaybeTensor none;
  const std::optional<int64_t> capacity =
      block_table ? std::optional<int64_t>(block_table->size(1) * k_cache.size(2)) : std::nullopt;
  Problem problem(
      kOp, q, k_cache, v_cache,
      {mask, bias, alibi_slopes, sink, none, scale, softcap, q_offset.value_or(0), window_left, window_right, 0.0},
      q.size(0), capacity);
  Attention& a = problem.a;
  const Type t = problem.type;
  const int64_t bytes = t == kDouble ? 8 : t == kFloat ? 4 : 2, wide = t == kDouble ? 8 : 4;

  // How many keys every sequence has, with the new ones.
  CHECK(!k_new == !v_new, kOp, ": k_new and v_new come together");
  const int64_t added = k_new ? k_new->size(2) : 0;
  std::vector<int64_t> lengths = integers(cache_seqlens, "cache_seqlens");
  CHECK(int64_t(lengths.size()) == a.B, kOp, ": cache_seqlens must be [B]");
  for (size_t b = 0; b < lengths.size(); ++b) {
    CHECK(lengths[b] >= 0 && lengths[b] + added <= a.S, kOp, ": sequence ", b, " has ", lengths[b],
          " keys in its cache and gets ", added, " more, but there is room for ", a.S);
    lengths[b] += added;
  }
  std::vector<int32_t> pages;
  if (block_table) {
    pages = checked_pages(*block_table, lengths, k_cache.size(2), k_cache.size(0));
    for (Heads* x : {&a.k, &a.v}) x->page_size = k_cache.size(2);
  }

  // New keys and values go into the cache; they and the queries are rotated on the way.
  CHECK(!cos == !sin, kOp, ": cos and sin come together");
  Rotation rotation{};
  if (cos) {
    CHECK(cos->dim() == 2 && sin->dim() == 2 && cos->size(0) == sin->size(0) && cos->size(1) == sin->size(1) &&
              cos->scalar_type() == sin->scalar_type() && 2 * cos->size(1) <= a.D,
          kOp, ": cos and sin must be [positions, up to D / 2]");
    rotation.cos = cos->data_ptr(), rotation.sin = sin->data_ptr(), rotation.type = type_of(*cos, kOp);
    rotation.cos_row = cos->stride(0), rotation.cos_d = cos->stride(1);
    rotation.sin_row = sin->stride(0), rotation.sin_d = sin->stride(1);
    rotation.rotated = 2 * cos->size(1), rotation.interleaved = rope_interleaved;
  }
  const Tensor q_rotated = cos ? empty({a.B, a.H, a.T, a.D}, q.scalar_type()) : q;
  std::vector<Rotation> rotations;
  auto rotate = [&](const Tensor& x, const char* name, const Heads& to, int64_t b, int64_t H, int64_t D, int64_t first,
                    int64_t position, bool rotated) {
    const int64_t rows = x.size(2);
    CHECK(x.size(0) == a.B && x.size(1) == H && x.size(3) == D && (rows == added || &x == &q), kOp, ": ", name,
          " must be [B, Hkv, T_new, head size of its cache]");
    CHECK(!rotated || rows == 0 || (position >= 0 && position + rows <= cos->size(0)), kOp, ": ", name,
          " stands at positions ", position, " to ", position + rows - 1, ", but cos and sin have ",
          cos ? cos->size(0) : 0, " rows");
    Rotation r = rotation;
    r.from = batch_entry(heads(x, kOp, name, t), b, bytes), r.to = to;
    if (!to.pages) r.to = batch_entry(to, b, bytes);
    r.H = H, r.T = rows, r.D = D, r.first = first, r.position = position;
    if (!rotated) r.rotated = 0;
    if (rows) rotations.push_back(r);
  };
  for (int64_t b = 0; b < a.B; ++b) {
    const int64_t had = lengths[b] - added;
    Heads k = a.k, v = a.v;
    if (block_table) k.pages = v.pages = pages.data() + b * block_table->size(1);
    if (k_new) rotate(*k_new, "k_new", k, b, a.Hkv, a.D, had, had, bool(cos));
    if (v_new) rotate(*v_new, "v_new", v, b, a.Hkv, a.Dv, had, 0, false);
    if (cos)
      rotate(q, "q", heads(q_rotated, kOp, "q", t), b, a.H, a.D, 0, q_offset ? *q_offset : lengths[b] - a.T, true);
  }
  std::vector<int64_t> first{0};
  for (const Rotation& r : rotations) first.push_back(first.back() + r.H);
  const AttentionDecodeKernels& table = *kernels().attention_decode;
  for_items(first.back(), 0, a.B * a.H * a.D * std::max(added, a.T) > 64 * 1024, [&](int64_t item, void*) {
    const size_t n = std::upper_bound(first.begin(), first.end(), item) - first.begin() - 1;
    const int64_t h = item - first[n], rows = rotations[n].T;
    table.rotate[t](rotations[n], h * rows, (h + 1) * rows);
  });

  const Tensor o = new_heads(q, a.Dv), lse = empty({a.B, a.H, a.T}, ScalarType::Double);
  a.q = heads(q_rotated, kOp, "q", t), a.o = heads(o, kOp, "o", t);
  a.lse = (double*)lse.data_ptr(), a.lse_b = a.H * a.T, a.lse_h = a.T;
  std::vector<Attention> parts;  // every sequence has its own length, so is a batch of its own
  for (int64_t b = 0; b < a.B; ++b) {
    Attention part = a;
    part.B = 1, part.S = lengths[b];
    part.q_offset = q_offset ? *q_offset : part.S - part.T;
    for (Heads* x : {&part.q, &part.o}) *x = batch_entry(*x, b, bytes);
    for (Heads* x : {&part.k, &part.v}) {
      if (block_table)
        x->pages = pages.data() + b * block_table->size(1);
      else
        *x = batch_entry(*x, b, bytes);
    }
    part.mask = batch_entry(a.mask, b), part.bias = batch_entry(a.bias, b);
    part.lse += b * a.lse_b;
    if (a.alibi_stride_b) part.alibi_slopes = (const char*)a.alibi_slopes + b * a.H * wide;
    parts.push_back(part);
  }
  attend(parts, t);
  return {o, lse};
}

}  // namespace fastllm::cpu
