// rope: every head row of q and k turned by the angle of its position.
#include "rotation.inl"

// The row of the tables for position t of batch entry b, of which the caller has checked that it exists.
inline int64_t table_row(const Rope& a, int64_t b, int64_t t) {
  int64_t position = t + a.offset;
  if (a.cu_seqlens) {
    int64_t sequence = 0;
    while (sequence + 1 < a.sequences && a.cu_seqlens[sequence + 1] <= t) ++sequence;
    position -= a.cu_seqlens[sequence];
    b = sequence;
  }
  return a.offsets ? position + a.offsets[b] : position;
}

template <class V, class S>
void rotate_heads(const Heads& x, const Heads& y, int64_t H, int64_t b, int64_t t, const Rope& a,
                  const typename V::T* c, const typename V::T* s) {
  for (int64_t h = 0; h < H; ++h)
    rotate_row<V>((const S*)x.data + b * x.b + h * x.h + t * x.t, (S*)y.data + b * y.b + h * y.h + t * y.t, a.D, a.R,
                  a.interleaved, c, s);
}

template <class V, class S, class Table>
void rope_with(const Rope& a, int64_t begin, int64_t end, void* workspace) {
  using T = typename V::T;
  T *c = (T*)workspace, *s = c + a.R;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i % a.B, t = i / a.B, row = table_row(a, b, t), at = b * a.table_b + row * a.table_t;
    if (i == begin || a.table_b || a.offsets || b == 0)  // without these, all of a batch turn alike
      spread_rotation((const Table*)a.cos + at, (const Table*)a.sin + at, a.R, a.interleaved, a.whole, a.inverse, c, s);
    rotate_heads<V, S>(a.q, a.yq, a.H, b, t, a, c, s);
    rotate_heads<V, S>(a.k, a.yk, a.Hk, b, t, a, c, s);
  }
}

template <class V, class S>
void rope(const Rope& a, int64_t begin, int64_t end, void* workspace) {
  switch (a.table_type) {
    case kFloat:
      return rope_with<V, S, float>(a, begin, end, workspace);
    case kBFloat16:
      return rope_with<V, S, bf16>(a, begin, end, workspace);
    case kHalf:
      return rope_with<V, S, half>(a, begin, end, workspace);
    default:
      return rope_with<V, S, double>(a, begin, end, workspace);
  }
}

constexpr RopeKernels kTable = {PER_TYPE(rope)};
