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

template <class V, class S>
void cross_entropy_fwd(const CrossEntropy& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (a.target[row] == a.ignore_index) {
      a.loss[row] = a.lse[row] = 0;
      if (a.right) a.right[row] = 0;
    } else {
      a.softcap ? cross_entropy_row_fwd<V, S, true>(a, row) : cross_entropy_row_fwd<V, S, false>(a, row);
    }
  }
}

template <class V, class S, bool kCapped>
FLATTENED void cross_entropy_row_bwd(const CrossEntropy& a, int64_t row) {
  using T = typename V::T;
  const S* x = (const S*)a.x + row * a.V;
  S* dx = (S*)a.dx + row * a.V;
  const T* weight = (const T*)a.weight;
  const int64_t t = a.target[row];
  const double s = a.label_smoothing, lse = a.lse[row], w = class_weight<T>(a, t);
  const double total = (1 - s) * w + s / double(a.V) * a.weight_sum + 2 * a.z_loss * lse;

  // The target's own gradient is a difference of its own, made in double before the row may be overwritten.
  const double zt = softcapped(double(widen(x[t])), a.softcap);
  double dt = a.dloss[row] * (::exp(zt - lse) * total - s / double(a.V) * w - (1 - s) * w);
  if (kCapped) dt *= 1 - zt / a.softcap * (zt / a.softcap);

  // exp(z - lse) = exp(z - high) exp(high - lse): the rounding of lse to T goes into the factor.
  const T high = T(lse);
  const V lse_high = V::set(high), one = V::set(1), zero = V::set(0);
  const V each = V::set(T(a.dloss[row] * total * ::exp(double(high) - lse))),
          flat = V::set(T(-a.dloss[row] * s / double(a.V)));
  const V inverse_cap = V::set(T(kCapped ? 1 / a.softcap : 0));
  const bool smooth = s != 0;
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
  narrow(T(dt), dx[t]);
}

template <class V, class S>
void cross_entropy_bwd(const CrossEntropy& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (a.target[row] == a.ignore_index)
      memset((S*)a.dx + row * a.V, 0, a.V * sizeof(S));
    else
      a.softcap ? cross_entropy_row_bwd<V, S, true>(a, row) : cross_entropy_row_bwd<V, S, false>(a, row);
  }
}

constexpr CrossEntropyKernels kTable = {PER_WIDE(cross_entropy_fwd), PER_WIDE(cross_entropy_bwd)};
