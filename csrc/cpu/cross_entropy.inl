// Cross-entropy of rows of logits x [N, V], forward in one pass over memory, backward from the log-sum-exp.
//
// With z = x, or softcap * tanh(x / softcap), log p = z - lse, target t and label smoothing s:
//   loss  = -(1 - s) w[t] log p[t] - s / V sum_c w[c] log p[c] + z_loss lse^2
//   dz[c] = dloss (p[c] total - s / V w[c] - (1 - s) w[t] [c = t]),  total = (1 - s) w[t] + s / V sum(w) + 2 z_loss lse
// An ignored row has loss 0 and gradient 0, whatever its logits are.

constexpr int64_t kAhead = 256;    // how far ahead of its use memory is fetched, in numbers
constexpr int64_t kLogits = 2048;  // read twice, for the largest and for the sum, the second time from the L1 cache

template <class V>
inline V softcapped(V x, double softcap) {
  return tanh(x * V::set(typename V::T(1 / softcap))) * V::set(typename V::T(softcap));
}
inline double softcapped(double x, double softcap) { return softcap ? softcap * ::tanh(x / softcap) : x; }

template <class T>
inline double class_weight(const CrossEntropy& a, int64_t c) {
  return a.weight ? double(((const T*)a.weight)[c]) : 1.0;
}

// Of equal logits the first is the largest, as in torch.argmax.
template <class V, class S>
bool is_largest(const S* x, int64_t t, int64_t size) {
  const auto target = widen(x[t]);
  const auto before = max_over<V>(t, [&](int64_t i, int64_t n) { return load<V>(x + i, n); });
  const auto after = max_over<V>(size - t - 1, [&](int64_t i, int64_t n) { return load<V>(x + t + 1 + i, n); });
  return before < target && after <= target;
}

template <class V, class S, bool kCapped>
FLATTENED void cross_entropy_row_fwd(const CrossEntropy& a, int64_t row) {
  using T = typename V::T;
  const S* x = (const S*)a.x + row * a.V;
  const T* weight = (const T*)a.weight;
  const int64_t t = a.target[row];
  T capped[kCapped ? kLogits : 1];
  double m = -INFINITY, total = 0, centre = 0, weighted = 0;
  for (int64_t start = 0; start < a.V; start += kLogits) {
    const int64_t size = a.V - start < kLogits ? a.V - start : kLogits;
    if (kCapped)
      for_vectors<V>(size,
                     [&](int64_t i, int64_t n) { keep(softcapped(load<V>(x + start + i, n), a.softcap), capped + i); });
    auto z = [&](int64_t i, int64_t n) {
      V v;
      if (kCapped)
        recall(capped + i, v);
      else
        v = load<V>(x + start + i, n);
      return v;
    };

    const double largest = max_over<V>(size, z);
    if (largest > m) {
      total *= ::exp(m - largest);
      m = largest;
    }
    const V shift = V::set(m > -INFINITY ? T(m) : T(0));  // -inf - -inf would be NaN
    const S* next = x + start + kLogits;                  // fetched here, where the terms leave the memory idle
    total += sum_over<V, V::kChains / 2>(size, [&](V sum, int64_t i, int64_t n) {
      PREFETCH(next + i);
      return sum + inside(exp_of_term(z(i, n) - shift), n);
    });

    if (a.label_smoothing) {  // sum_c w[c] (z[c] - centre): logits far from 0 would lose their digits in the sum
      if (start == 0) centre = largest - largest == 0 ? largest : 0;
      const V c = V::set(T(centre));
      weighted += sum_over<V>(size, [&](V sum, int64_t i, int64_t n) {
        const V d = inside(z(i, n) - c, n);
        return weight ? fma(d, load<V>(weight + start + i, n), sum) : sum + d;
      });
    }
  }

  const double lse = m > -INFINITY ? m + ::log(total) : m + total, s = a.label_smoothing;
  double loss = (1 - s) * class_weight<T>(a, t) * (lse - softcapped(double(widen(x[t])), a.softcap));
  if (s) loss -= s / double(a.V) * (weighted - a.weight_sum * (lse - centre));
  a.loss[row] = loss + (a.z_loss ? a.z_loss * lse * lse : 0.0);
  a.lse[row] = lse;
  if (a.right) a.right[row] = is_largest<V>(x, t, a.V);
}

// What of a row's gradient is made in double. The target's own is a difference of its own, made before the row may be
// overwritten; elsewhere it is exp(z - T(lse)) factor + flat w[c].
struct TargetGradient {
  double gradient, factor, flat;
};
// e^x, without the library's for an x that is no more than a rounding: the next term is below 2e-13.
inline double exp_of_rounding(double x) { return x * x < 1e-8 ? 1 + x * (1 + 0.5 * x) : ::exp(x); }
// `share` is s / V, once for many rows.
template <class T, class S, bool kCapped>
inline TargetGradient target_gradient(const CrossEntropy& a, int64_t row, double share) {
  const int64_t t = a.target[row];
  const double s = a.label_smoothing, lse = a.lse[row], w = class_weight<T>(a, t), dloss = a.dloss[row];
  const double total = (1 - s) * w + share * a.weight_sum + 2 * a.z_loss * lse;
  const double zt = softcapped(double(widen(((const S*)a.x)[row * a.V + t])), a.softcap);
  double dt = dloss * (::exp(zt - lse) * total - share * w - (1 - s) * w);
  if (kCapped) dt *= 1 - zt / a.softcap * (zt / a.softcap);
  // exp(z - lse) = exp(z - high) exp(high - lse): the rounding of lse to T goes into the factor.
  return {dt, dloss * total * exp_of_rounding(double(T(lse)) - lse), -dloss * share};
}

template <class V, class S, bool kCapped>
FLATTENED void cross_entropy_row_bwd(const CrossEntropy& a, int64_t row) {
  using T = typename V::T;
  const S* x = (const S*)a.x + row * a.V;
  S* dx = (S*)a.dx + row * a.V;
  const T* weight = (const T*)a.weight;
  const TargetGradient g = target_gradient<T, S, kCapped>(a, row, a.label_smoothing / double(a.V));
  const V lse_high = V::set(T(a.lse[row])), one = V::set(1), zero = V::set(0);
  const V each = V::set(T(g.factor)), flat = V::set(T(g.flat));
  const V inverse_cap = V::set(T(kCapped ? 1 / a.softcap : 0));
  const bool smooth = a.label_smoothing != 0;
  const double softcap = a.softcap;
  for_vectors<V>(a.V, [&](int64_t i, int64_t n) {
    V z = load<V>(x + i, n);
    if (kCapped) z = softcapped(z, softcap);
    PREFETCH(x + kAhead + i);
    PREFETCH(dx + kAhead + i);
    V d = exp_of_term(z - lse_high) * each;
    if (smooth) d = weight ? fma(load<V>(weight + i, n), flat, d) : d + flat;
    if (kCapped) {
      const V u = z * inverse_cap;
      d = d * fma(zero - u, u, one);
    }
    store(d, dx + i, n);
  });
  narrow(T(g.gradient), dx[a.target[row]]);
}

#include "cross_entropy_few.inl"

constexpr int64_t kFewGradients = kFewColumns / 2;  // in backward the way back to rows costs more

template <class V, class S>
void cross_entropy_fwd(const CrossEntropy& a, int64_t begin, int64_t end) {
  if (a.V <= kFewColumns) {
    using One = typename SingleOf<V>::type;
    for (int64_t row = begin; row < end; row += One::L) {
      const int64_t rows = end - row < One::L ? end - row : One::L;
      a.softcap ? cross_entropy_few_fwd<One, S, true>(a, row, rows)
                : cross_entropy_few_fwd<One, S, false>(a, row, rows);
    }
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    if (a.target[row] == a.ignore_index) {
      a.loss[row] = a.lse[row] = 0;
      if (a.right) a.right[row] = 0;
    } else {
      a.softcap ? cross_entropy_row_fwd<V, S, true>(a, row) : cross_entropy_row_fwd<V, S, false>(a, row);
    }
  }
}

template <class V, class S>
void cross_entropy_bwd(const CrossEntropy& a, int64_t begin, int64_t end) {
  if (a.V <= kFewGradients) {
    using One = typename SingleOf<V>::type;
    for (int64_t row = begin; row < end; row += One::L) {
      const int64_t rows = end - row < One::L ? end - row : One::L;
      a.softcap ? cross_entropy_few_bwd<One, S, true>(a, row, rows)
                : cross_entropy_few_bwd<One, S, false>(a, row, rows);
    }
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    if (a.target[row] == a.ignore_index)
      memset((S*)a.dx + row * a.V, 0, a.V * sizeof(S));
    else
      a.softcap ? cross_entropy_row_bwd<V, S, true>(a, row) : cross_entropy_row_bwd<V, S, false>(a, row);
  }
}

constexpr CrossEntropyKernels kTable = {PER_WIDE(cross_entropy_fwd), PER_WIDE(cross_entropy_bwd)};
