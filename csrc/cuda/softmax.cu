// softmax and log_softmax of rows of x [B, H, T, S], scaled, masked and causal, forward and backward.
//
// A row is read once where it fits into the registers of a block or, from sm_90 on, of a cluster of blocks; a longer
// one is walked over twice, every thread keeping a maximum and a sum of its own the first time.
// Source for the walk: Milakov and Gimelshein 2018, arXiv:1805.02867.
#include "cuda/row.cuh"

namespace fastllm::cuda {
namespace {

// Where a running maximum starts. Finite: exp(-inf - kLowest) is 0, but exp(-inf - -inf) would be NaN.
constexpr float kLowest = -3.0e38f;
constexpr int kMostThreads = 1024;

struct SoftmaxLaunch {
  Softmax a;
  int threads;  // of a block that share a row
  int rows;     // of a block
};

// One row: how many of its leading columns causality leaves, and where its mask lies.
struct SoftmaxRow {
  int64_t visible;
  const uint8_t* mask;
  int64_t mask_stride;
};
DEVICE SoftmaxRow softmax_row(const Softmax& a, int64_t row) {
  SoftmaxRow r = {a.S, a.mask, a.mask_stride[3]};
  if (!a.causal && !a.mask) return r;  // two divisions of 64 bits are worth a test
  const int64_t t = row % a.T, h = row / a.T % a.H, b = row / a.T / a.H;
  if (a.causal) r.visible = t + a.S - a.T + 1;  // the last row sees everything
  if (a.mask) r.mask += b * a.mask_stride[0] + h * a.mask_stride[1] + t * a.mask_stride[2];
  return r;
}

// scale * x of the columns i, i + 1, ..., -inf where hidden.
template <class T, int V>
DEVICE void load_scores(float (&s)[V], const Softmax& a, const SoftmaxRow& row, const T* x, int64_t i) {
  const Pack<T, V> pack = load<V>(x + i);
#pragma unroll
  for (int n = 0; n < V; ++n) {
    const bool visible = i + n < row.visible && (!row.mask || row.mask[(i + n) * row.mask_stride]);
    s[n] = visible ? widen(pack.x[n]) * a.scale : -INFINITY;
  }
}

template <class T, int V, bool kOnChip>
__global__ void __launch_bounds__(kMostThreads, 1) softmax_fwd_kernel(SoftmaxLaunch launch) {
  const Softmax& a = launch.a;
  Team team(launch.threads);
  const int64_t index = int64_t(blockIdx.x) / cluster_size() * launch.rows + team.row();
  const int64_t columns = index < a.N ? a.S : 0;
  const SoftmaxRow row = softmax_row(a, columns ? index : 0);
  const T* x = (const T*)a.x + index * a.S;

  // s - m, and exp of it where that is wanted: kept, or made again.
  float kept[kOnChip ? kPacks : 1][V];
  float m[1] = {kLowest}, l[1] = {0};
  for_packs<kOnChip, V>(team, columns, [&](int pack, int64_t i) {
    float (&s)[V] = kept[pack];
    load_scores<T>(s, a, row, x, i);
    float largest = m[0];
#pragma unroll
    for (int n = 0; n < V; ++n) largest = Max()(largest, s[n]);
    if constexpr (!kOnChip) {
      l[0] *= expf(m[0] - largest);
#pragma unroll
      for (int n = 0; n < V; ++n) l[0] += expf(s[n] - largest);
    }
    m[0] = largest;
  });
  const float own = m[0];
  team.reduce(m, Max());
  if constexpr (kOnChip) {
    for_packs<true, V>(team, columns, [&](int pack, int64_t) {
#pragma unroll
      for (int n = 0; n < V; ++n) {
        const float s = kept[pack][n] - m[0], e = expf(s);
        kept[pack][n] = a.log ? s : e;
        l[0] += e;
      }
    });
  } else {
    l[0] *= expf(own - m[0]);
  }
  team.reduce(l, Sum());
  const float total = l[0] == 0 ? 1.0f : l[0], log_total = logf(total), inverse = 1.0f / total;

  for_packs<kOnChip, V>(team, columns, [&](int pack, int64_t i) {
    float (&s)[V] = kept[pack];
    if constexpr (!kOnChip) {
      load_scores<T>(s, a, row, x, i);
#pragma unroll
      for (int n = 0; n < V; ++n) s[n] = a.log ? s[n] - m[0] : expf(s[n] - m[0]);
    }
    Pack<T, V> y;
#pragma unroll
    for (int n = 0; n < V; ++n) {
      // A quotient from the reciprocal and its remainder is rounded once, as a division is, and much cheaper.
      const float q = s[n] * inverse;
      narrow(a.log ? s[n] - log_total : fmaf(fmaf(-q, total, s[n]), inverse, q), y.x[n]);
    }
    store(y, (T*)a.y + index * a.S + i);
  });
  team.leave();
}

// dx = scale * y * (dy - sum(y * dy)); for the logarithm scale * (dy - exp(y) * sum(dy)), 0 where y is -inf.
template <class T, int V, bool kOnChip>
__global__ void __launch_bounds__(kMostThreads, 1) softmax_bwd_kernel(SoftmaxLaunch launch) {
  const Softmax& a = launch.a;
  Team team(launch.threads);
  const int64_t index = int64_t(blockIdx.x) / cluster_size() * launch.rows + team.row();
  const int64_t columns = index < a.N ? a.S : 0, begin = index * a.S;

  Pack<T, V> y_kept[kOnChip ? kPacks : 1], dy_kept[kOnChip ? kPacks : 1];
  auto fetch = [&](int64_t i, Pack<T, V>& y, Pack<T, V>& dy) {
    y = load<V>((const T*)a.y + begin + i);
    dy = load<V>((const T*)a.dy + begin + i);
  };
  float total[1] = {0};
  for_packs<kOnChip, V>(team, columns, [&](int pack, int64_t i) {
    fetch(i, y_kept[pack], dy_kept[pack]);
#pragma unroll
    for (int n = 0; n < V; ++n) {
      const float dy = widen(dy_kept[pack].x[n]);
      total[0] += a.log ? dy : dy * widen(y_kept[pack].x[n]);
    }
  });
  team.reduce(total, Sum());
  forget_widened(y_kept), forget_widened(dy_kept);
  if constexpr (kOnChip) {
    if (!a.log) {  // where one y is nearly 1, dy - total cancels: a second step takes the rounding out of total
      float rest[1] = {0};
      for_packs<true, V>(team, columns, [&](int pack, int64_t) {
#pragma unroll
        for (int n = 0; n < V; ++n) rest[0] += widen(y_kept[pack].x[n]) * (widen(dy_kept[pack].x[n]) - total[0]);
      });
      team.reduce(rest, Sum());
      forget_widened(y_kept), forget_widened(dy_kept);
      total[0] += rest[0];
    }
  }
  for_packs<kOnChip, V>(team, columns, [&](int pack, int64_t i) {
    if constexpr (!kOnChip) fetch(i, y_kept[pack], dy_kept[pack]);
    Pack<T, V> dx;
#pragma unroll
    for (int n = 0; n < V; ++n) {
      const float y = widen(y_kept[pack].x[n]), dy = widen(dy_kept[pack].x[n]);
      const float d = !a.log ? y * (dy - total[0]) : y == -INFINITY ? 0.0f : dy - expf(y) * total[0];
      narrow(d * a.scale, dx.x[n]);
    }
    store(dx, (T*)a.dx + begin + i);
  });
  team.leave();
}

Error launch_rows(const Softmax& a, int V, void (*on_chip)(SoftmaxLaunch), void (*walking)(SoftmaxLaunch),
                  Stream stream) {
  const Share s = share(a.S, V, kMostThreads, has_clusters());
  const int blocks = s.blocks ? s.blocks : 1;
  const int64_t groups = (a.N + s.rows - 1) / s.rows;
  return launch(s.blocks ? on_chip : walking, Grid{groups * blocks, s.threads * s.rows, kScratchBytes, blocks},
                SoftmaxLaunch{a, s.threads, s.rows}, stream);
}

bool wide(const Softmax& a, int V) {
  return a.S % V == 0 && aligned(a.x) && aligned(a.y) && aligned(a.dy) && aligned(a.dx);
}

template <class T>
Error softmax_fwd_of(const Softmax& a, Stream stream) {
  constexpr int V = kWide<T>;
  if (!wide(a, V)) return launch_rows(a, 1, softmax_fwd_kernel<T, 1, true>, softmax_fwd_kernel<T, 1, false>, stream);
  return launch_rows(a, V, softmax_fwd_kernel<T, V, true>, softmax_fwd_kernel<T, V, false>, stream);
}
template <class T>
Error softmax_bwd_of(const Softmax& a, Stream stream) {
  constexpr int V = kWide<T>;
  if (!wide(a, V)) return launch_rows(a, 1, softmax_bwd_kernel<T, 1, true>, softmax_bwd_kernel<T, 1, false>, stream);
  return launch_rows(a, V, softmax_bwd_kernel<T, V, true>, softmax_bwd_kernel<T, V, false>, stream);
}

}  // namespace

Error softmax_fwd(Type type, const Softmax& a, Stream stream) {
  switch (type) {
    case kFloat:
      return softmax_fwd_of<float>(a, stream);
    case kBFloat16:
      return softmax_fwd_of<bf16>(a, stream);
    default:
      return softmax_fwd_of<half>(a, stream);
  }
}

Error softmax_bwd(Type type, const Softmax& a, Stream stream) {
  switch (type) {
    case kFloat:
      return softmax_bwd_of<float>(a, stream);
    case kBFloat16:
      return softmax_bwd_of<bf16>(a, stream);
    default:
      return softmax_bwd_of<half>(a, stream);
  }
}

}  // namespace fastllm::cuda
