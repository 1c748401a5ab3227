// Cross-entropy of few classes: as many rows at once as a vector has lanes.

#include "lanes.inl"

constexpr int64_t kColumnsRoom = (kFewColumns + 15) / 16 * 16;  // in whole vectors of any instruction set
constexpr int64_t kSide = 4;                                    // columns whose terms are summed side by side

template <class V, class S, bool kCapped>
FLATTENED void cross_entropy_few_fwd(const CrossEntropy& a, int64_t first, int64_t rows) {
  using T = typename V::T;
  const S* x = (const S*)a.x + first * a.V;
  const T* weight = (const T*)a.weight;
  const V zero = V::set(0), lowest = V::set(-INFINITY);
  V z[kColumnsRoom];
  load_columns(x, rows, a.V, z);
  const int64_t padded = (a.V + kSide - 1) / kSide * kSide;  // there is room
  for (int64_t c = a.V; c < padded; ++c) z[c] = lowest;
  V m = lowest, sums[kSide];
  for (int64_t c = 0; c < a.V; ++c) {
    if (kCapped) z[c] = softcapped(z[c], a.softcap);
    m = max(m, z[c]);
  }
  const V shift = select_lt(lowest, m, m, zero);  // -inf - -inf would be NaN
  UNROLLED for (int64_t u = 0; u < kSide; ++u) sums[u] = zero;
  for (int64_t c = 0; c < padded; c += kSide)
    UNROLLED for (int64_t u = 0; u < kSide; ++u) sums[u] = sums[u] + exp_of_term(z[c + u] - shift);
  const V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  T largest[V::L], total[V::L], centre[V::L], weighted[V::L];
  keep(m, largest), keep(sum, total);
  const double s = a.label_smoothing;
  if (s) {  // sum_c w[c] (z[c] - centre), centred as in cross_entropy_row_fwd
    const V middle = select_lt(shift, V::set(INFINITY), shift, zero);
    V of_class = zero;
    for (int64_t c = 0; c < a.V; ++c)
      of_class = weight ? fma(z[c] - middle, V::set(weight[c]), of_class) : of_class + (z[c] - middle);
    keep(middle, centre), keep(of_class, weighted);
  }

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first + r, t = a.target[row];
    const bool ignored = t == a.ignore_index;
    if (a.right) a.right[row] = !ignored && is_largest<V>(x + r * a.V, t, a.V);
    if (ignored) {
      a.loss[row] = a.lse[row] = 0;
      continue;
    }
    const double high = largest[r], lse = high > -INFINITY ? high + ::log(double(total[r])) : high + total[r];
    double loss = (1 - s) * class_weight<T>(a, t) * (lse - softcapped(double(widen(x[r * a.V + t])), a.softcap));
    if (s) loss -= s / double(a.V) * (double(weighted[r]) - a.weight_sum * (lse - double(centre[r])));
    a.loss[row] = loss + (a.z_loss ? a.z_loss * lse * lse : 0.0);
    a.lse[row] = lse;
  }
}

template <class V, class S, bool kCapped>
FLATTENED void cross_entropy_few_bwd(const CrossEntropy& a, int64_t first, int64_t rows) {
  using T = typename V::T;
  const S* x = (const S*)a.x + first * a.V;
  S* dx = (S*)a.dx + first * a.V;
  const T* weight = (const T*)a.weight;
  T lse_high[V::L] = {}, factor[V::L] = {}, smoothing[V::L] = {}, counted[V::L] = {};
  double of_target[V::L];
  const double share = a.label_smoothing / double(a.V);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first + r, t = a.target[row];
    if (t == a.ignore_index) continue;
    const TargetGradient g = target_gradient<T, S, kCapped>(a, row, share);
    lse_high[r] = T(a.lse[row]), factor[r] = T(g.factor), smoothing[r] = T(g.flat), counted[r] = 1;
    of_target[r] = g.gradient;
  }
  V z[kColumnsRoom];
  load_columns(x, rows, a.V, z);
  const V high = V::load(lse_high), each = V::load(factor), flat = V::load(smoothing), kept = V::load(counted);
  const V one = V::set(1), zero = V::set(0), inverse_cap = V::set(T(kCapped ? 1 / a.softcap : 0));
  for (int64_t c = 0; c < a.V; ++c) {
    if (kCapped) z[c] = softcapped(z[c], a.softcap);
    V d = exp_of_term(z[c] - high) * each;
    if (a.label_smoothing) d = weight ? fma(V::set(weight[c]), flat, d) : d + flat;
    if (kCapped) {
      const V u = z[c] * inverse_cap;
      d = d * fma(zero - u, u, one);
    }
    z[c] = select_lt(zero, kept, d, zero);  // of an ignored row even where its logits are NaN
  }
  store_columns(z, dx, rows, a.V);
  for (int64_t r = 0; r < rows; ++r)
    if (counted[r] != 0) narrow(T(of_target[r]), dx[r * a.V + a.target[first + r]]);
}
