// Cross-entropy of rows of logits x [N, V], forward with an online log-sum-exp, backward from it, or both at once.
//
// With the soft-capped logits z, lse = log sum exp(z) and log p = z - lse, a row's loss is
//   (1 - s) w[t] (lse - z[t]) + s / V sum_c w[c] (lse - z[c]) + z_loss lse^2.
// Forward reads a row once, every thread keeping a maximum and a sum of its own; backward reads it once and writes the
// gradient. Where the loss's gradient is known, one kernel makes both: it reads a row twice, the second time from the
// cache. From sm_90 on a cluster of blocks shares a long row; it stays in their registers where it fits, and is read
// once for loss and gradient. A target that is no class makes the loss NaN: looking for one would mean to wait.
// Source of the walk: Milakov and Gimelshein 2018, arXiv:1805.02867.
#include "cuda/row.cuh"

namespace fastllm::cuda {
namespace {

// Where a running maximum starts. Finite: exp(-inf - kLowest) is 0, but exp(-inf - -inf) would be NaN.
constexpr float kLowest = -3.0e38f;
constexpr int kMostThreads = 1024;

// Rows are kept on chip by clusters alone: without them that kernel is empty.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kClusters = false;
#else
constexpr bool kClusters = true;
#endif

struct CrossEntropyLaunch {
  CrossEntropy a;
  int threads;  // of a block that share a row
  int rows;     // of a block
};

// Sums over a block in fp64, in an order that is always the same; thread 0 has them.
template <int kValues>
DEVICE void sum_block(double (&v)[kValues]) {
  double* all = (double*)shared_memory();
  for (int n = 0; n < kValues; ++n) {
    all[threadIdx.x] = v[n];
    for (int half = kMostThreads / 2; half; half /= 2) {
      sync_block();
      if (int(threadIdx.x) < half) all[threadIdx.x] += all[threadIdx.x + half];
    }
    sync_block();
    v[n] = all[0];
    sync_block();
  }
}
constexpr int kSumBytes = kMostThreads * int(sizeof(double));

DEVICE bool is_class(const CrossEntropy& a, int64_t t) { return t >= 0 && t < a.V; }
DEVICE float class_weight(const CrossEntropy& a, int64_t c) { return a.weight.data ? number(a.weight, c) : 1.0f; }

// Of the classes c, c + 1, ...
template <int V>
DEVICE void load_class_weights(float (&w)[V], const CrossEntropy& a, int64_t c) {
  if (a.weight.data) return load_vector(w, a.weight, c);
#pragma unroll
  for (int n = 0; n < V; ++n) w[n] = 1;
}

// One block: over the rows that are not ignored, the sum of their weights and their number; the sum of all weights.
// As much of it as is asked for.
__global__ void __launch_bounds__(kMostThreads, 1) cross_entropy_total_kernel(CrossEntropy a) {
  double sums[3] = {0, 0, 0};
  for (int64_t i = threadIdx.x; a.total && i < a.N; i += kMostThreads) {
    const int64_t t = a.target[i];
    if (t == a.ignore_index) continue;
    if (is_class(a, t)) sums[0] += class_weight(a, t);
    sums[1] += 1;
  }
  for (int64_t c = threadIdx.x; a.weight_sum && c < a.V; c += kMostThreads) sums[2] += number(a.weight, c);
  sum_block(sums);
  if (threadIdx.x == 0 && a.total) a.total[0] = sums[0], a.total[1] = sums[1];
  if (threadIdx.x == 0 && a.weight_sum) a.weight_sum[0] = sums[2];
}

// What is alike for all logits of a row.
struct LossRow {
  bool kept, known;
  int64_t t;
  float hot;         // (1 - s) w[t]
  float smooth;      // s / V
  float weight_sum;  // of all classes
  float z_loss;  // The mean divides by the sum of weights, but the z-loss, which has no class, by the number of rows.
};
DEVICE LossRow loss_row(const CrossEntropy& a, int64_t row) {
  LossRow r;
  r.t = a.target[row];
  r.kept = r.t != a.ignore_index;
  r.known = is_class(a, r.t);
  r.hot = (1.0f - a.label_smoothing) * class_weight(a, r.known ? r.t : 0);
  r.smooth = a.label_smoothing / float(a.V);
  r.weight_sum = a.weight_sum ? float(a.weight_sum[0]) : float(a.V);
  r.z_loss = a.total ? a.z_loss * float(a.total[0] / a.total[1]) : a.z_loss;
  return r;
}

DEVICE float capped(const CrossEntropy& a, float x) { return a.softcap > 0 ? a.softcap * tanhf(x / a.softcap) : x; }
DEVICE bool is_finite(float x) { return x - x == 0; }

// What the gradients of a row's logits have in common:
//   dz = dloss (p (w[t] (1 - s) + s / V sum w + 2 z_loss lse) - s / V w - (1 - s) w[t] [c = t]).
struct RowGradient {
  float dloss;
  float of_p;  // what p is multiplied by
};
DEVICE RowGradient row_gradient(const CrossEntropy& a, const LossRow& r, int64_t row, float lse) {
  RowGradient g;
  g.dloss = number(a.dloss, a.dloss_per_row ? row : 0);
  if (a.total) g.dloss /= float(a.total[0]);
  if (!r.known) g.dloss = NAN;
  g.of_p = r.hot + r.smooth * r.weight_sum + 2.0f * r.z_loss * lse;
  return g;
}

// The gradient of the logits i, i + 1, ..., of which e(z) * g.of_p makes the part that comes from p.
template <class T, int V, class Exp>
DEVICE Pack<T, V> gradient(const CrossEntropy& a, const LossRow& r, const RowGradient& g, const Pack<T, V>& x,
                           int64_t i, Exp e) {
  float weight[V] = {};
  if (a.label_smoothing > 0) load_class_weights(weight, a, i);
  Pack<T, V> d;
#pragma unroll
  for (int n = 0; n < V; ++n) {
    const float z = capped(a, widen(x.x[n]));
    float dz = e(z) * g.of_p;
    if (i + n == r.t) dz -= r.hot;
    if (a.label_smoothing > 0) dz -= r.smooth * weight[n];
    if (a.softcap > 0) dz *= 1.0f - (z / a.softcap) * (z / a.softcap);
    narrow(r.kept ? dz * g.dloss : 0.0f, d.x[n]);
  }
  return d;
}

template <class T, int V, bool kOnChip, bool kGradient>
DEVICE void cross_entropy_of_rows(const CrossEntropyLaunch& launch) {
  const CrossEntropy& a = launch.a;
  Team team(launch.threads);
  const int64_t row = int64_t(blockIdx.x) / cluster_size() * launch.rows + team.row(), index = row < a.N ? row : 0;
  const LossRow r = loss_row(a, index);
  const int64_t columns = row < a.N && r.kept ? a.V : 0;
  const T* x = (const T*)a.x + index * a.V;
  const float target = widen(x[r.known ? r.t : 0]);

  // Smoothed targets need sum_c w[c] (z[c] - centre): logits far from 0 would lose their digits in the sum.
  float centre[1] = {kLowest};
  if (a.label_smoothing > 0) {
    if (int64_t(team.rank()) * V < columns) {
      const Pack<T, V> first = load<V>(x + team.rank() * V);
#pragma unroll
      for (int n = 0; n < V; ++n) centre[0] = Max()(centre[0], capped(a, widen(first.x[n])));
    }
    team.reduce(centre, Max());
    if (!is_finite(centre[0]) || centre[0] == kLowest) centre[0] = 0;
  }

  Pack<T, V> kept[kOnChip ? kPacks : 1];
  float m[1] = {kLowest}, sums[2] = {0, 0};  // of exp(z - m), and of w (z - centre)
  float larger[1] = {0};                     // how many come before the target when logits are sorted
  for_packs<kOnChip, V>(team, columns, [&](int pack, int64_t i) {
    kept[pack] = load<V>(x + i);
    float z[V], weight[V];
    if (a.label_smoothing > 0) load_class_weights(weight, a, i);
    float largest = m[0];
#pragma unroll
    for (int n = 0; n < V; ++n) {
      const float logit = widen(kept[pack].x[n]);
      z[n] = capped(a, logit);
      largest = Max()(largest, z[n]);
      if (a.label_smoothing > 0) sums[1] += weight[n] * (z[n] - centre[0]);
      if (a.right) larger[0] += logit > target || (logit == target && i + n < r.t) || logit != logit ? 1.0f : 0.0f;
    }
    if constexpr (!kOnChip) {
      sums[0] *= expf(m[0] - largest);
#pragma unroll
      for (int n = 0; n < V; ++n) sums[0] += expf(z[n] - largest);
    }
    m[0] = largest;
  });
  const float own = m[0];
  team.reduce(m, Max());
  if constexpr (kOnChip) {
    forget_widened(kept);
    for_packs<true, V>(team, columns, [&](int pack, int64_t) {
#pragma unroll
      for (int n = 0; n < V; ++n) sums[0] += expf(capped(a, widen(kept[pack].x[n])) - m[0]);
    });
  } else {
    sums[0] *= expf(own - m[0]);
  }
  team.reduce(sums, Sum());
  if (a.right) team.reduce(larger, Max());

  if (row < a.N && team.rank() == 0) {
    const double lse = double(m[0]) + log(double(sums[0]));
    double loss = double(r.hot) * (lse - double(capped(a, target)));
    if (a.label_smoothing > 0)
      loss -= double(r.smooth) * (double(sums[1]) - double(r.weight_sum) * (lse - double(centre[0])));
    loss += double(r.z_loss) * lse * lse;
    if (!r.known) loss = NAN;
    if (!r.kept) loss = 0;
    if (a.lse) a.lse[row] = r.kept ? lse : 0;
    if (a.row_loss)
      a.row_loss[row] = loss;
    else
      a.loss[row] = float(loss);
    if (a.right) a.right[row] = r.kept && r.known && target == target && larger[0] == 0;
  }

  if constexpr (kGradient) {
    sync_block();  // everybody has the target's logit, which is overwritten now where dx is x
    RowGradient g = row_gradient(a, r, index, m[0] + logf(sums[0]));
    g.of_p /= sums[0];
    forget_widened(kept);
    for_packs<kOnChip, V>(team, row < a.N ? a.V : 0, [&](int pack, int64_t i) {
      if constexpr (!kOnChip) kept[pack] = load<V>(x + i);
      store(gradient(a, r, g, kept[pack], i, [&](float z) { return expf(z - m[0]); }), (T*)a.dx + index * a.V + i);
    });
  }
  team.leave();
}
template <class T, int V, bool kOnChip, bool kGradient>
__global__ void __launch_bounds__(kMostThreads, 1) cross_entropy_fwd_kernel(CrossEntropyLaunch launch) {
  if constexpr (kClusters || !kOnChip) cross_entropy_of_rows<T, V, kOnChip, kGradient>(launch);
}

// One block: the sum of the rows' losses, over the sum of their weights where the mean is wanted.
__global__ void __launch_bounds__(kMostThreads, 1) cross_entropy_reduce_kernel(CrossEntropy a) {
  double sum[1] = {0};
  for (int64_t i = threadIdx.x; i < a.N; i += kMostThreads) sum[0] += a.row_loss[i];
  sum_block(sum);
  if (threadIdx.x == 0) a.loss[0] = float(a.total ? sum[0] / a.total[0] : sum[0]);
}

template <class T, int V>
__global__ void __launch_bounds__(kMostThreads, 1) cross_entropy_bwd_kernel(CrossEntropyLaunch launch) {
  const CrossEntropy& a = launch.a;
  Team team(launch.threads);
  const int64_t row = int64_t(blockIdx.x) * launch.rows + team.row(), index = row < a.N ? row : 0;
  const LossRow r = loss_row(a, index);
  // lse in two parts: rounding it would be the largest error of the gradient.
  const double lse = a.lse[index];
  const float high = float(lse), low = float(lse - double(high));
  const RowGradient g = row_gradient(a, r, index, high);
  for_packs<false, V>(team, row < a.N ? a.V : 0, [&](int, int64_t i) {
    const Pack<T, V> x = load<V>((const T*)a.x + index * a.V + i);
    store(gradient(a, r, g, x, i, [&](float z) { return expf((z - high) - low); }), (T*)a.dx + index * a.V + i);
  });
}

// How a pass goes through rows: `on_chip` in clusters where a row needs more than one block and fits into them,
// `walking` else. A row that no cluster can keep has all blocks of the largest walking over it.
Error launch_rows(const CrossEntropy& a, int V, void (*on_chip)(CrossEntropyLaunch),
                  void (*walking)(CrossEntropyLaunch), Stream stream) {
  const bool clusters = on_chip && has_clusters();
  const Share s = share(a.V, V, kMostThreads, clusters);
  const int blocks = !clusters ? 1 : s.blocks ? s.blocks : kMostBlocks;
  const int64_t groups = (a.N + s.rows - 1) / s.rows;
  return launch(clusters && s.blocks > 1 ? on_chip : walking,
                Grid{groups * blocks, s.threads * s.rows, kScratchBytes, blocks},
                CrossEntropyLaunch{a, s.threads, s.rows}, stream);
}

bool wide(const CrossEntropy& a, int V) {
  return a.V % V == 0 && aligned(a.x) && aligned(a.dx) && aligned(a.weight.data);
}

template <class T, int V>
Error cross_entropy_fwd_in(const CrossEntropy& a, Stream stream) {
  if (a.dx)
    return launch_rows(a, V, cross_entropy_fwd_kernel<T, V, true, true>, cross_entropy_fwd_kernel<T, V, false, true>,
                       stream);
  return launch_rows(a, V, cross_entropy_fwd_kernel<T, V, true, false>, cross_entropy_fwd_kernel<T, V, false, false>,
                     stream);
}
template <class T>
Error cross_entropy_fwd_of(const CrossEntropy& a, Stream stream) {
  return wide(a, kWide<T>) ? cross_entropy_fwd_in<T, kWide<T>>(a, stream) : cross_entropy_fwd_in<T, 1>(a, stream);
}
template <class T>
Error cross_entropy_bwd_of(const CrossEntropy& a, Stream stream) {
  constexpr int V = kWide<T>;
  if (wide(a, V)) return launch_rows(a, V, nullptr, cross_entropy_bwd_kernel<T, V>, stream);
  return launch_rows(a, 1, nullptr, cross_entropy_bwd_kernel<T, 1>, stream);
}

Error cross_entropy_fwd_of(Type type, const CrossEntropy& a, Stream stream) {
  if (!a.N) return nullptr;
  switch (type) {
    case kFloat:
      return cross_entropy_fwd_of<float>(a, stream);
    case kBFloat16:
      return cross_entropy_fwd_of<bf16>(a, stream);
    default:
      return cross_entropy_fwd_of<half>(a, stream);
  }
}

}  // namespace

Error cross_entropy_total(const CrossEntropy& a, Stream stream) {
  if (!a.total && !a.weight_sum) return nullptr;
  return launch(cross_entropy_total_kernel, Grid{1, kMostThreads, kSumBytes}, a, stream);
}

Error cross_entropy_fwd(Type type, const CrossEntropy& a, bool reduced, Stream stream) {
  Error error = cross_entropy_total(a, stream);
  if (!error) error = cross_entropy_fwd_of(type, a, stream);
  if (error || !reduced) return error;
  return launch(cross_entropy_reduce_kernel, Grid{1, kMostThreads, kSumBytes}, a, stream);
}

Error cross_entropy_rows(Type type, const CrossEntropy& a, Stream stream) {
  CrossEntropy weights = a;
  weights.total = nullptr;  // of all rows: given
  const Error error = cross_entropy_total(weights, stream);
  return error ? error : cross_entropy_fwd_of(type, a, stream);
}

Error cross_entropy_bwd(Type type, const CrossEntropy& a, Stream stream) {
  const Error error = cross_entropy_total(a, stream);
  if (error || !a.N) return error;
  switch (type) {
    case kFloat:
      return cross_entropy_bwd_of<float>(a, stream);
    case kBFloat16:
      return cross_entropy_bwd_of<bf16>(a, stream);
    default:
      return cross_entropy_bwd_of<half>(a, stream);
  }
}

}  // namespace fastllm::cuda
