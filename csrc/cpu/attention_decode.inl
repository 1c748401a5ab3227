// Attention of a few queries on many keys: decoding. Keys are cut into ranges whose results are merged by log-sum-exp.

#include "attention_rows.inl"

template <class V, class S, class W>
struct AttentionDecode : AttentionRows<V, S, W> {
  using Rows = AttentionRows<V, S, W>;
  using Rows::kKeys, Rows::kSplit, Rows::rows, Rows::splits;
  using typename Rows::Blocks, typename Rows::T, typename Rows::X;

  // o, maximum and sum of every row: of a range, below 2% of what it reads.
  static int64_t result_size(const Attention& a) { return rows(a) * (a.Dv + 2); }

  struct Workspace {
    typename Rows::Left q;
    W* p;  // p is s where a word is one number
    T *s, *rescale, *result;
    const S *keys[kKeys], *values[kKeys], *next[kKeys];  // next: keys of the next pass
    Workspace(const Attention& a, void* memory, int64_t* bytes) {
      Arena arena{(char*)memory, 0};
      const int64_t R = rows(a);
      q = Rows::Left::take(arena, R, a.D);
      s = arena.take<T>(R * kKeys);
      p = X::kPer == 1 ? (W*)s : arena.take<W>(R * kKeys / X::kPer);
      rescale = arena.take<T>(R);
      result = arena.take<T>(a.splits == 1 ? result_size(a) : 0);
      if (bytes) *bytes = arena.used;
    }
  };
  static int64_t bytes(const Attention& a) {
    int64_t n;
    Workspace(a, nullptr, &n);
    return n;
  }

  // p = exp(score - max) in place of the products of row r, the running maximum and sum, and what the old o is
  // multiplied with.
  static NOINLINE void exponentials(const Attention& a, const Workspace& w, int64_t b, int64_t kv, int64_t r,
                                    int64_t k0, int64_t keys, T* m, T* l) {
    const typename Rows::RowScores score(a, b, kv, r, k0, keys);
    const V scale = V::set(score.raw ? T(a.scale) : T(1));
    T* s = w.s + r * kKeys;
    V top = V::set(*m), total = V::set(0);
    for (int64_t k = 0; k < keys; k += V::L) {
      const V x = score(V::load(s + k), k) * scale;
      x.store(s + k);
      top = max(top, x);
    }
    const T now = max_of(top);
    T rescale[V::L];
    exp(V::set(*m - now)).store(rescale);
    for (int64_t k = 0; k < keys; k += V::L) {
      const V p = exp_fma(V::load(s + k), V::set(1), V::set(-now), V::set(0));
      if constexpr (X::kPer == 1)
        p.store((T*)w.p + r * kKeys + k);
      else
        p.store((S*)w.p + r * kKeys + k);
      total = total + p;
    }
    *l = *l * rescale[0] + sum(total);
    *m = now;
    w.rescale[r] = rescale[0];
  }

  static void run(const Attention& a, int64_t item, void* memory) {
    const int64_t split = item % a.splits, head = item / a.splits, b = head / a.Hkv, kv = head % a.Hkv, R = rows(a);
    Workspace w(a, memory, nullptr);
    T* result = a.splits == 1 ? w.result : (T*)a.partial + item * result_size(a);
    T *o = result, *m = result + R * a.Dv, *l = m + R;
    for (int64_t i = 0; i < R * a.Dv; ++i) o[i] = 0;
    for (int64_t r = 0; r < R; ++r) m[r] = T(-1e30), l[r] = 0;
    const Range seen = visible_keys(a, 0, a.T);
    const int64_t begin = clamp(split * kSplit, seen.begin, seen.end);
    const int64_t end = split + 1 == a.splits ? seen.end : clamp((split + 1) * kSplit, seen.begin, seen.end);
    if (begin < end) Rows::pack(a, a.q, b, kv, w.q);
    if (begin < end) Rows::find_rows(a.k, b, kv, begin, clamp(end - begin, 0, kKeys), w.next);
    for (int64_t k0 = begin; k0 < end; k0 += kKeys) {
      const int64_t keys = clamp(end - k0, 0, kKeys), left = clamp(end - k0 - keys, 0, kKeys);
      memcpy(w.keys, w.next, sizeof(w.keys));
      Rows::find_rows(a.v, b, kv, k0, keys, w.values);
      if (left) Rows::find_rows(a.k, b, kv, k0 + keys, left, w.next);
      Rows::in_groups(R, [&](auto n, int64_t r0) {
        constexpr int N = decltype(n)::value;
        Rows::template products<N>(w.q, r0, w.keys, keys, w.values, a.Dv, w.s);
        for (int64_t r = r0; r < r0 + N; ++r) exponentials(a, w, b, kv, r, k0, keys, m + r, l + r);
        Rows::template add_all_rows<N>(w.p, w.values, r0, 0, keys, a.Dv, w.rescale, w.next, a.D, o);
      });
    }
    if (a.splits == 1) write(a, b, kv, result);
  }

  // o and lse of key head kv from the results of its ranges; the sink is one more score, without a value. The maxima
  // in `results` become the ranges' weights.
  static void write(const Attention& a, int64_t b, int64_t kv, T* results) {
    const int64_t R = rows(a), size = result_size(a);
    for (int64_t r = 0; r < R; ++r) {
      const int64_t h = Rows::head(a, kv, r), t = r % a.T;
      T *o = results + r * a.Dv, *m = results + R * a.Dv + r, *l = m + R;
      double top = a.sink ? ((const T*)a.sink)[h] : -1e30, total = 0;
      for (int64_t i = 0; i < a.splits; ++i) top = m[i * size] > top ? m[i * size] : top;
      if (a.sink) total = ::exp(((const T*)a.sink)[h] - top);
      for (int64_t i = 0; i < a.splits; ++i) total += ::exp(m[i * size] - top) * l[i * size];
      if (a.lse) a.lse[b * a.lse_b + h * a.lse_h + t] = total == 0 ? -INFINITY : top + log(total);
      for (int64_t i = 0; i < a.splits; ++i) m[i * size] = total == 0 ? T(0) : T(::exp(m[i * size] - top) / total);
      S* to = (S*)Blocks::row(a.o, b, h, t);
      for_vectors<V>(a.Dv, [&](int64_t d, int64_t n) {
        V x = load<V>(o + d, n) * V::set(m[0]);
        for (int64_t i = 1; i < a.splits; ++i) x = fma(load<V>(o + i * size + d, n), V::set(m[i * size]), x);
        if (a.o.d == 1) {
          store(x, to + d, n);
        } else {
          T lanes[V::L];
          x.store(lanes);
          for (int64_t i = 0; i < n; ++i) narrow(lanes[i], to[(d + i) * a.o.d]);
        }
      });
    }
  }
};

template <class V, class S, class W>
int64_t attention_decode_splits(const Attention& a) {
  return AttentionDecode<V, S, W>::splits(a);
}
template <class V, class S, class W>
int64_t attention_decode_bytes(const Attention& a) {
  return AttentionDecode<V, S, W>::bytes(a);
}
template <class V, class S, class W>
void attention_decode(const Attention& a, int64_t item, void* workspace) {
  AttentionDecode<V, S, W>::run(a, item, workspace);
}
template <class V, class S, class W>
void attention_decode_merge(const Attention& a, int64_t begin, int64_t end) {
  using Decode = AttentionDecode<V, S, W>;
  for (int64_t head = begin; head < end; ++head)
    Decode::write(a, head / a.Hkv, head % a.Hkv, (typename V::T*)a.partial + head * a.splits * Decode::result_size(a));
}

// Rows (h, t) of new keys, values or queries to where they are kept, the first r.rotated values of each rotated by the
// angles of its position: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).
template <class V, class S, class Angle>
void rotate_rows(const Rotation& r, int64_t begin, int64_t end) {
  using T = typename V::T;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t h = row / r.T, t = row % r.T, at = r.first + t, pairs = r.rotated / 2;
    const S* x = (const S*)r.from.data + h * r.from.h + t * r.from.t;
    S* y = (S*)r.to.data + h * r.to.h + (r.to.pages ? at % r.to.page_size : at) * r.to.t;
    if (r.to.pages) y += r.to.pages[at / r.to.page_size] * r.to.b;
    const Angle* cosine = (const Angle*)r.cos + (r.position + t) * r.cos_row;
    const Angle* sine = (const Angle*)r.sin + (r.position + t) * r.sin_row;
    const int64_t step = r.interleaved ? 2 : 1, apart = r.interleaved ? 1 : pairs;
    for (int64_t i = 0; i < pairs; ++i) {
      const T c = T(widen(cosine[i * r.cos_d])), s = T(widen(sine[i * r.sin_d]));
      const T x1 = widen(x[i * step * r.from.d]), x2 = widen(x[(i * step + apart) * r.from.d]);
      narrow(x1 * c - x2 * s, y[i * step * r.to.d]);
      narrow(x2 * c + x1 * s, y[(i * step + apart) * r.to.d]);
    }
    for (int64_t d = r.rotated; d < r.D; ++d) y[d * r.to.d] = x[d * r.from.d];
  }
}
template <class V, class S>
void attention_decode_rotate(const Rotation& r, int64_t begin, int64_t end) {
  switch (r.type) {
    case kBFloat16:
      return rotate_rows<V, S, bf16>(r, begin, end);
    case kHalf:
      return rotate_rows<V, S, half>(r, begin, end);
    case kDouble:
      return rotate_rows<V, S, double>(r, begin, end);
    default:
      return rotate_rows<V, S, float>(r, begin, end);
  }
}

constexpr AttentionDecodeKernels kTable = {
    PER_TYPE_AND_WORD(attention_decode_splits), PER_TYPE_AND_WORD(attention_decode_bytes),
    PER_TYPE_AND_WORD(attention_decode), PER_TYPE_AND_WORD(attention_decode_merge), PER_TYPE(attention_decode_rotate)};
