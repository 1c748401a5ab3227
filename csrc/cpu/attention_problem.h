// A call of attention in the kernels' terms, and how its forward pass is spread over threads; for the files of
// bindings.
#pragma once
#include "cpu/tensors.h"

namespace fastllm::cpu {
namespace {

inline Heads heads(const Tensor& x, const char* op, const char* name, Type t) {
  CHECK(x.dim() == 4 && type_of(x, op) == t, op, ": ", name, " must be 4-D, with the dtype of q");
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

inline Scores broadcast(const MaybeTensor& x, const Attention& a, const char* op, const char* name, int type) {
  if (!x) return {};
  CHECK(x->dim() == 4, op, ": ", name, " must be 4-D");
  const int64_t full[4] = {a.B, a.H, a.T, a.S};
  int64_t stride[4];
  for (int i = 0; i < 4; ++i) {
    CHECK(x->size(i) == full[i] || x->size(i) == 1, op, ": ", name, " must broadcast to [B, H, T, S]");
    stride[i] = x->size(i) == 1 ? 0 : x->stride(i);
  }
  return {x->data_ptr(), stride[0], stride[1], stride[2], stride[3], type};
}

// What the schemas call the options, in their order.
struct Options {
  const MaybeTensor &mask, &bias, &alibi_slopes, &sink, &seed;
  double scale, softcap;
  int64_t q_offset, left, right;
  double dropout_p;
};

// A call in the kernels' terms, and the small inputs it needed converted.
struct Problem {
  Attention a{};
  Type type;
  InComputeType alibi_slopes, sink;

  // `sequences` is how many have ALiBi slopes of their own: the batch, unless that is packed. `paged` is how many keys
  // a sequence can have in pages k, v [pages, Hkv, page_size, D].
  Problem(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Options& options, int64_t sequences,
          std::optional<int64_t> paged = {})
      : type(type_of(q, op)), alibi_slopes(options.alibi_slopes, type, op), sink(options.sink, type, op) {
    a.q = heads(q, op, "q", type), a.k = heads(k, op, "k", type), a.v = heads(v, op, "v", type);
    a.B = q.size(0), a.H = q.size(1), a.T = q.size(2), a.D = q.size(3);
    a.Hkv = k.size(1), a.S = paged.value_or(k.size(2)), a.Dv = v.size(3);
    CHECK((paged || k.size(0) == a.B) && v.size(0) == k.size(0) && v.size(1) == a.Hkv && v.size(2) == k.size(2) &&
              k.size(3) == a.D,
          op, ": q [B, H, T, D], k [B, Hkv, S, D] and v [B, Hkv, S, Dv] do not fit each other");
    CHECK(a.H == 0 || (a.Hkv > 0 && a.H % a.Hkv == 0), op, ": H must be a multiple of Hkv");
    CHECK(a.D > 0 && a.Dv > 0, op, ": D and Dv must be at least 1");
    // Positions are added to each other: beyond 2^40 a side is unbounded, and an offset makes no sense.
    constexpr int64_t kFar = int64_t(1) << 40;
    CHECK(options.q_offset > -kFar && options.q_offset < kFar, op, ": q_offset is out of range");
    a.scale = options.scale, a.softcap = options.softcap, a.q_offset = options.q_offset;
    a.left = options.left < kFar ? options.left : -1;
    a.right = options.right < kFar ? options.right : -1;
    if (options.mask) CHECK(options.mask->scalar_type() == ScalarType::Bool, op, ": mask must be bool");
    a.mask = broadcast(options.mask, a, op, "mask", kTypes);
    a.bias = broadcast(options.bias, a, op, "bias", options.bias ? type_of(*options.bias, op) : kFloat);
    if (options.alibi_slopes) {
      const int64_t n = options.alibi_slopes->numel();
      CHECK(n == a.H || n == sequences * a.H, op, ": alibi_slopes must be [H] or [B, H]");
      a.alibi_slopes = alibi_slopes.data();
      a.alibi_stride_b = options.alibi_slopes->dim() == 2 ? a.H : 0;
    }
    CHECK(!options.sink || options.sink->numel() == a.H, op, ": sink must be [H]");
    a.sink = sink.data();
    CHECK(options.dropout_p >= 0 && options.dropout_p < 1, op, ": dropout_p must be in [0, 1)");
    a.dropout_p = options.dropout_p;
    if (a.dropout_p > 0) a.seed = seed_of(options.seed, op);
  }
};

// A fork and join costs about a microsecond: as much as this many multiplications.
inline bool worth_threads(const Attention& a) { return double(a.B) * a.H * a.T * a.S * (a.D + a.Dv) > 100e3; }

// run(part, item, memory) for every item of every part; `items` and `bytes` tell how many each has and what it needs.
template <class Items, class Bytes, class Run>
void for_parts(const std::vector<Attention>& parts, Items items, Bytes bytes, Run run) {
  std::vector<int64_t> first{0};
  int64_t most = 0;
  bool threads = false;
  for (const Attention& a : parts) {
    first.push_back(first.back() + (a.T ? items(a) : 0));
    most = std::max(most, bytes(a));
    threads = threads || worth_threads(a) || parts.size() > 16;
  }
  for_items(first.back(), most, threads, [&](int64_t item, void* memory) {
    const size_t n = std::upper_bound(first.begin(), first.end(), item) - first.begin() - 1;
    run(parts[n], item - first[n], memory);
  });
}

// A part with few queries is bound by reading keys: attention_decode.inl.
inline bool decodes(const Attention& a) {
  constexpr int64_t kFewQueries = 8;  // from there on a vector of queries is full enough
  return a.Hkv > 0 && a.T <= kFewQueries && a.dropout_p == 0 && a.k.d == 1 && a.v.d == 1;
}

// The forward pass of parts that all decode.
inline void decode(std::vector<Attention>& parts, Type t) {
  const AttentionDecodeKernels& table = *kernels().attention_decode;
  auto results = [](const Attention& a) {  // numbers that the ranges of a part leave to be merged
    return a.splits > 1 ? a.B * a.splits * a.H * a.T * (a.Dv + 2) : 0;
  };
  int64_t n = 0, heads = 0, most = 0;
  for (Attention& a : parts) {
    a.splits = table.splits[t](a);
    n += results(a), heads += a.splits > 1 ? a.B * a.Hkv : 0, most = std::max(most, results(a));
  }
  const Tensor partial = empty({n}, compute_type(t));
  n = 0;
  for (Attention& a : parts) {
    a.partial = (char*)partial.data_ptr() + n * (t == kDouble ? 8 : 4);
    n += results(a);
  }
  for_parts(parts, [](const Attention& a) { return a.B * a.Hkv * a.splits; }, table.bytes[t], table.run[t]);
  if (heads)
    for_parts(
        parts, [](const Attention& a) { return a.splits > 1 ? a.B * a.Hkv : 0; },
        [](const Attention&) { return int64_t(0); },
        [&](const Attention& a, int64_t head, void*) { table.merge[t](a, head, head + 1); });
}

// An item is several blocks of queries where that saves reading keys, and while there are items enough for the threads:
// of long sequences, as keys and values beyond the second-level cache come from farther away, once for every item; and
// of short ones, whose heads are then an item each.
inline void share_keys(std::vector<Attention>& parts, Type t) {
  constexpr int64_t kMost = 4, kBlock = 64, kItems = 4;
  constexpr int64_t kFar = 2 << 20, kHeld = 256 << 10;  // bytes: of a head's keys and values; of an item's blocks
  auto blocks_of = [](const Attention& a) { return (a.T + kBlock - 1) / kBlock; };
  int64_t blocks = 0;
  for (const Attention& a : parts) blocks += a.B * a.H * blocks_of(a);
  const int64_t enough = blocks / (kItems * torch::stable::get_num_threads());
  for (Attention& a : parts)
    if (a.S * (a.D + a.Dv) * bytes_of(t) >= kFar || blocks_of(a) <= kMost)
      a.together = std::min({kMost, enough, std::max<int64_t>(1, kHeld / (kBlock * (a.D + a.Dv) * 4))});
}

inline void attend(std::vector<Attention>& parts, Type t) {
  bool few = true;
  for (const Attention& a : parts) few = few && decodes(a);
  const AttentionKernels& table = *kernels().attention;
  if (few) return decode(parts, t);
  share_keys(parts, t);
  for_parts(parts, table.items[t], table.bytes[t], table.run[t]);
}

}  // namespace
}  // namespace fastllm::cpu
