// Which keys a block of queries sees, and its scores: the one place where scores are made (ScoreOf), forward, backward
// and decoding.
//
// Tiles are [key][query]: kKeys rows of kRow numbers, kQueries of them used. Query i of the block at q0 stands at key
// position q0 + i + q_offset.

#include "philox.inl"

struct Range {
  int64_t begin, end;
};
inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// The keys that some of the queries [q0, q0 + n) see, as far as position decides.
inline Range visible_keys(const Attention& a, int64_t q0, int64_t n) {
  const int64_t end = a.right < 0 ? a.S : clamp(q0 + n + a.q_offset + a.right, 0, a.S);
  return {a.left < 0 ? 0 : clamp(q0 + a.q_offset - a.left, 0, end), end};
}
// The queries that see some of the keys [k0, k0 + n).
inline Range seeing_queries(const Attention& a, int64_t k0, int64_t n) {
  const int64_t end = a.left < 0 ? a.T : clamp(k0 + n + a.left - a.q_offset, 0, a.T);
  return {a.right < 0 ? 0 : clamp(k0 - a.right - a.q_offset, 0, end), end};
}

// The end of a run of keys from `key` (before `end`) whose first seeing query lies in the same vector of the block at
// q0, and that vector: what lies before it on the causal side is not computed. Runs have even length, for words of two
// keys.
template <class V>
inline int64_t run_end(const Attention& a, int64_t q0, int64_t key, int64_t end, int64_t vectors, int64_t& first) {
  first = 0;
  if (a.right < 0) return end;
  const int64_t shift = a.right + a.q_offset + q0;  // query q0 + i sees keys up to shift + i
  first = clamp((key - shift) / V::L, 0, vectors - 1);
  if (first == vectors - 1) return end;
  const int64_t next = shift + (first + 1) * V::L, run = next - key + ((next - key) & 1);
  return key + run < end ? key + run : end;
}

// tile[k][q] = x[b, h, q0 + q, k0 + k] of a [B, H, T, S] tensor, zeros for q >= queries.
template <class V, class S>
void load_transposed(const Scores& x, const S* p, int64_t keys, int64_t queries, int64_t vectors, int64_t row,
                     typename V::T* tile) {
  using T = typename V::T;
  if (x.t == 0) {
    for (int64_t k = 0; k < keys; ++k)
      for (int64_t v = 0; v < vectors; ++v) V::set(T(widen(p[k * x.s]))).store(tile + k * row + v * V::L);
    return;
  }
  for (int64_t v = 0; v < vectors; ++v)
    for (int64_t k = 0; k < keys; k += V::L) {
      const int64_t n = clamp(keys - k, 0, V::L), m = clamp(queries - v * V::L, 0, V::L);
      V r[V::L];
      for (int64_t i = 0; i < V::L; ++i) {
        const S* from = p + (v * V::L + i) * x.t + k * x.s;
        if (i >= m) {
          r[i] = V::set(0);
        } else if (x.s == 1) {
          r[i] = load<V>(from, n);
        } else {
          T lanes[V::L] = {};
          for (int64_t j = 0; j < n; ++j) lanes[j] = T(widen(from[j * x.s]));
          r[i] = V::load(lanes);
        }
      }
      transpose(r);
      for (int64_t j = 0; j < n; ++j) r[j].store(tile + (k + j) * row + v * V::L);
    }
}
template <class V>
void load_scores(const Scores& x, int64_t b, int64_t h, int64_t q0, int64_t k0, int64_t keys, int64_t queries,
                 int64_t vectors, int64_t row, typename V::T* tile) {
  const int64_t at = b * x.b + h * x.h + q0 * x.t + k0 * x.s;
  switch (x.type) {
    case kFloat:
      return load_transposed<V>(x, (const float*)x.data + at, keys, queries, vectors, row, tile);
    case kBFloat16:
      return load_transposed<V>(x, (const bf16*)x.data + at, keys, queries, vectors, row, tile);
    case kHalf:
      return load_transposed<V>(x, (const half*)x.data + at, keys, queries, vectors, row, tile);
    case kDouble:
      return load_transposed<V>(x, (const double*)x.data + at, keys, queries, vectors, row, tile);
    default:
      return load_transposed<V>(x, (const uint8_t*)x.data + at, keys, queries, vectors, row, tile);
  }
}

// score(q.k) of one query head: scale, soft-cap, bias, ALiBi, in this order. `distance` is the query's position less
// the key's; `slope`, where given, receives d(capped score) / d(score).
template <class V>
struct ScoreOf {
  using T = typename V::T;
  const V scale, cap, per_cap, alibi;
  const bool capped, biased, sloped;

  ScoreOf(const Attention& a, int64_t b, int64_t h)
      : scale(V::set(T(a.scale))),
        cap(V::set(T(a.softcap))),
        per_cap(V::set(a.softcap > 0 ? T(1 / a.softcap) : T(0))),
        alibi(V::set(a.alibi_slopes ? ((const T*)a.alibi_slopes)[b * a.alibi_stride_b + h] : T(0))),
        capped(a.softcap > 0),
        biased(a.bias.data),
        sloped(a.alibi_slopes) {}

  V operator()(V dot, const T* bias, V distance, T* slope = nullptr) const {
    V x = dot * scale;
    if (capped) {
      const V t = tanh(x * per_cap);
      x = t * cap;
      if (slope) fma(V::set(0) - t, t, V::set(1)).store(slope);
    }
    if (biased) x = x + V::load(bias);
    if (sloped) x = x - alibi * max(distance, V::set(0) - distance);
    return x;
  }
};

template <class V>
struct ScoreTile {
  using T = typename V::T;
  static constexpr int64_t kQueries = V::L >= 8 ? 64 : 8 * V::L;  // of a block
  // From row to row of a tile. Where a product takes only some of a row's vectors, a row of 256 bytes would leave three
  // quarters of the cache's sets unused: one line more, an odd number, takes all of them in turn.
  static constexpr int64_t kRow = Tiles::kColumns * V::L >= kQueries ? kQueries : kQueries + 64 / int64_t(sizeof(T));

  const Attention& a;
  int64_t b, h, q0, queries, vectors;
  T scale;
  T *mask, *bias, *keep;  // tiles, for what the call has of them
  T* slope;               // backward with a soft-cap: d(capped score) / d(score)

  // Whether the scores are q.k times a positive scale, which the exponential and the maximum can take on the way.
  bool plain() const { return !a.mask.data && !a.bias.data && !a.alibi_slopes && a.softcap == 0 && scale > 0; }
  // Whether position hides some of the keys [k0, k0 + keys) from some of the n queries from q on.
  bool cut(int64_t k0, int64_t keys, int64_t q, int64_t n) const {
    const int64_t first = q0 + q + a.q_offset, last = first + n - 1;
    return (a.right >= 0 && k0 + keys - 1 > first + a.right) || (a.left >= 0 && k0 < last - a.left);
  }

  // Reads what belongs to the keys [k0, k0 + keys); false if the mask hides all of them.
  bool load(int64_t k0, int64_t keys) const {
    if (a.mask.data) {
      load_scores<V>(a.mask, b, h, q0, k0, keys, queries, vectors, kRow, mask);
      V any = V::set(0);
      for (int64_t k = 0; k < keys; ++k)
        for (int64_t v = 0; v < vectors; ++v) any = max(any, V::load(mask + k * kRow + v * V::L));
      if (!(max_of(any) > 0)) return false;
    }
    if (a.bias.data) load_scores<V>(a.bias, b, h, q0, k0, keys, queries, vectors, kRow, bias);
    if (a.dropout_p > 0) draw(k0, keys);
    return true;
  }

  // keep[k][q] = 1 / (1 - dropout_p), or 0 with probability dropout_p. The counter is (query, key / 4, head of the
  // batch).
  void draw(int64_t k0, int64_t keys) const {
    const uint32_t threshold = dropout_threshold(a.dropout_p), bh = uint32_t(a.first_head + b * a.H + h);
    const T kept = T(1 / (1 - a.dropout_p));
    for (int64_t group = k0 / 4; group * 4 < k0 + keys; ++group)
      for (int64_t v = 0; v < vectors; ++v) {
        uint32_t words[4][V::L];
        for (int i = 0; i < V::L; ++i) {
          words[0][i] = uint32_t(q0 + v * V::L + i), words[1][i] = uint32_t(group);
          words[2][i] = bh, words[3][i] = 0;
        }
        philox<V::L>(words, a.seed);
        T lanes[4][V::L];
        for (int j = 0; j < 4; ++j)
          for (int i = 0; i < V::L; ++i) lanes[j][i] = words[j][i] < threshold ? T(0) : kept;
        const int64_t k = group * 4 - k0;  // of the group's first key
        for (int64_t j = k < 0 ? -k : 0; j < 4 && k + j < keys; ++j)
          V::load(lanes[j]).store(keep + (k + j) * kRow + v * V::L);
      }
  }

  // s[k][q] holds q.k for the keys k0 + [begin, end) and the vectors [first, last); it becomes the score (q.k still
  // where that is plain), -inf where hidden.
  void finish(T* s, int64_t k0, int64_t begin, int64_t end, int64_t first, int64_t last) const {
    const V hidden = V::set(-INFINITY);
    const ScoreOf<V> score(a, b, h);
    const bool raw = plain();
    for (int64_t k = begin; k < end; ++k) {
      const int64_t at = k0 + k - a.q_offset - q0;  // the query of this block at this key's position
      const V low = V::set(a.right < 0 ? T(-1) : T(clamp(at - a.right, -1, queries)));
      const V high = V::set(a.left < 0 ? T(kQueries) : T(clamp(at + a.left, -1, kQueries)));
      for (int64_t v = first; v < last; ++v) {
        const int64_t place = k * kRow + v * V::L;
        const V i = V::iota() + V::set(T(v * V::L));
        V x = V::load(s + place);
        if (!raw) x = score(x, bias ? bias + place : nullptr, i - V::set(T(at)), slope ? slope + place : nullptr);
        x = select_lt(i, low, hidden, select_lt(high, i, hidden, x));
        if (a.mask.data) x = select_lt(V::set(0), V::load(mask + place), x, hidden);
        x.store(s + place);
      }
    }
  }
};
