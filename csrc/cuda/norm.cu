// layer_norm and rms_norm, forward and backward: y = (h - mean) * rstd * weight + bias with h = x + residual.
//
// A row is read once where it fits into the registers of a block or, from sm_90 on, of a cluster of blocks; a longer
// one is walked over, and comes from the L2 cache the second time. No atomics: sums have a fixed order.
#include "cuda/row.cuh"

namespace fastllm::cuda {
namespace {

// Most threads of a block, which decides how many registers each may have: backward keeps h, dy and one or two sums.
constexpr int kFwdThreads = 1024;
template <class T, bool kCentred>
constexpr int kBwdThreads = kCentred && sizeof(T) == 2 ? 256 : 512;

struct NormLaunch {
  Norm a;
  int threads;  // of a block that share a row
  int rows;     // of a block
};

// h of the columns i, i + 1, ...: x itself, or the sum with the residual, rounded as the next block will see it.
template <class T, int V>
DEVICE Pack<T, V> load_sum(const Norm& a, int64_t at) {
  Pack<T, V> h = load<V>((const T*)a.x + at);
  if (a.residual) {
    const Pack<T, V> residual = load<V>((const T*)a.residual + at);
#pragma unroll
    for (int n = 0; n < V; ++n) narrow(widen(h.x[n]) + widen(residual.x[n]), h.x[n]);
    store(h, (T*)a.h + at);
  }
  return h;
}

template <class T, int V, bool kOnChip>
__global__ void __launch_bounds__(kFwdThreads, 1) norm_fwd_kernel(NormLaunch launch) {
  const Norm& a = launch.a;
  Team team(launch.threads);
  const int64_t row = int64_t(blockIdx.x) / cluster_size() * launch.rows + team.row();
  const int64_t columns = row < a.N ? a.D : 0, begin = row * a.D;

  Pack<T, V> kept[kOnChip ? kPacks : 1] = {};
  const T* again = (const T*)(a.residual ? a.h : a.x);
  auto h_of = [&](int pack, int64_t i) {
    if constexpr (kOnChip)
      return kept[pack];
    else
      return load<V>(again + begin + i);  // what this thread wrote, where there is a residual
  };

  float mean = 0;
  float sum[1] = {0};
  for_packs<kOnChip, V>(team, columns, [&](int pack, int64_t i) {
    const Pack<T, V> h = load_sum<T, V>(a, begin + i);
    if constexpr (kOnChip) kept[pack] = h;
#pragma unroll
    for (int n = 0; n < V; ++n) sum[0] += widen(h.x[n]);
  });
  if (a.mean) {
    team.reduce(sum, Sum());
    mean = sum[0] / float(a.D);
  }
  forget_widened(kept);

  // The variance from centred values: E[h^2] - mean^2 would cancel where the mean is large. The mean is rounded: what
  // is left of it in the centred row corrects both.
  float squares[2] = {0, 0};
  for_packs<kOnChip, V>(team, columns, [&](int pack, int64_t i) {
    const Pack<T, V> h = h_of(pack, i);
#pragma unroll
    for (int n = 0; n < V; ++n) {
      const float d = widen(h.x[n]) - mean;
      squares[0] += d * d;
      squares[1] += d;
    }
  });
  team.reduce(squares, Sum());
  forget_widened(kept);
  if (a.mean) {
    const float correction = squares[1] / float(a.D);
    squares[0] -= correction * correction * float(a.D);
    squares[0] = squares[0] < 0 ? 0 : squares[0];  // a constant row far from 0
    mean += correction;
  }
  const float rstd = 1.0f / sqrtf(squares[0] / float(a.D) + a.eps);
  if (columns && team.rank() == 0) {
    if (a.mean) a.mean[row] = mean;
    a.rstd[row] = rstd;
  }

  for_packs<kOnChip, V>(team, columns, [&](int pack, int64_t i) {
    const Pack<T, V> h = h_of(pack, i);
    Pack<T, V> y;
    float weight[V], bias[V];
    if (a.weight.data) load_vector(weight, a.weight, i);
    if (a.bias.data) load_vector(bias, a.bias, i);
#pragma unroll
    for (int n = 0; n < V; ++n) {
      float v = (widen(h.x[n]) - mean) * rstd;
      if (a.weight.data) v *= weight[n] + a.weight_offset;
      if (a.bias.data) v += bias[n];
      narrow(v, y.x[n]);
    }
    store(y, (T*)a.y + begin + i);
  });
  team.leave();
}

// sums[i + n] (+)= v[n]; `first` sets.
template <int V>
DEVICE void add_to(float* sums, int64_t i, const float (&v)[V], bool first) {
  constexpr int kPart = V < 4 ? V : 4;
#pragma unroll
  for (int j = 0; j < V; j += kPart) {
    Pack<float, kPart> sum = {};
    if (!first) sum = load<kPart>(sums + i + j);
#pragma unroll
    for (int n = 0; n < kPart; ++n) sum.x[n] += v[j + n];
    store(sum, sums + i + j);
  }
}

// Gradients of a stripe of rows: with g = dy * weight and xhat = (h - mean) * rstd,
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dh, without mean(g) for rms_norm,
// and the sums of dy * xhat and of dy over the rows: in registers, or in their place in memory for rows that are
// walked.
template <class T, int V, bool kOnChip, bool kCentred>
__global__ void __launch_bounds__(kBwdThreads<T, kCentred>, 1) norm_bwd_kernel(NormLaunch launch) {
  const Norm& a = launch.a;
  Team team(launch.threads);
  const int64_t stripe = int64_t(blockIdx.x) / cluster_size();
  const int64_t begin = a.N * stripe / a.stripes, end = a.N * (stripe + 1) / a.stripes;
  float* const dweight_part = a.dweight_parts ? a.dweight_parts + stripe * a.D : nullptr;
  float* const dbias_part = kCentred && a.dbias_parts ? a.dbias_parts + stripe * a.D : nullptr;

  Pack<T, V> h_kept[kOnChip ? kPacks : 1], dy_kept[kOnChip ? kPacks : 1];
  float dweight[kOnChip ? kPacks : 1][V] = {}, dbias[kOnChip && kCentred ? kPacks : 1][V] = {};

  for (int64_t base = begin; base < end; base += launch.rows) {
    const int64_t row = base + team.row(), columns = row < end ? a.D : 0, at = row * a.D;
    const float mean = kCentred && columns ? a.mean[row] : 0, rstd = columns ? a.rstd[row] : 0;
    float sums[2] = {0, 0};
    for_packs<kOnChip, V>(team, columns, [&](int pack, int64_t i) {
      const Pack<T, V> h = load<V>((const T*)a.h + at + i), dy = load<V>((const T*)a.dy + at + i);
      if constexpr (kOnChip) h_kept[pack] = h, dy_kept[pack] = dy;
      float weight[V], dw[V], db[V];
      if (a.weight.data) load_vector(weight, a.weight, i);
#pragma unroll
      for (int n = 0; n < V; ++n) {
        const float xhat = (widen(h.x[n]) - mean) * rstd;
        db[n] = widen(dy.x[n]);
        dw[n] = db[n] * xhat;
        const float g = a.weight.data ? weight[n] + a.weight_offset : 1.0f;
        sums[0] += dw[n] * g;
        if constexpr (kCentred) sums[1] += db[n] * g;
        if constexpr (kOnChip) {
          dweight[pack][n] += dw[n];
          if constexpr (kCentred) dbias[pack][n] += db[n];
        }
      }
      if constexpr (!kOnChip) {
        if (dweight_part) add_to(dweight_part, i, dw, row == begin);
        if (dbias_part) add_to(dbias_part, i, db, row == begin);
      }
    });
    team.reduce(sums, Sum());
    forget_widened(h_kept), forget_widened(dy_kept);
    const float mean_gx = sums[0] / float(a.D), mean_g = kCentred ? sums[1] / float(a.D) : 0;

    for_packs<kOnChip, V>(team, columns, [&](int pack, int64_t i) {
      Pack<T, V> h, dy, dh, dx;
      if constexpr (kOnChip)
        h = h_kept[pack], dy = dy_kept[pack];
      else
        h = load<V>((const T*)a.h + at + i), dy = load<V>((const T*)a.dy + at + i);
      if (a.dh) dh = load<V>((const T*)a.dh + at + i);
      float weight[V];
      if (a.weight.data) load_vector(weight, a.weight, i);
#pragma unroll
      for (int n = 0; n < V; ++n) {
        const float xhat = (widen(h.x[n]) - mean) * rstd, d = widen(dy.x[n]);
        const float g = a.weight.data ? d * (weight[n] + a.weight_offset) : d;
        float v = (g - xhat * mean_gx - mean_g) * rstd;
        if (a.dh) v += widen(dh.x[n]);
        narrow(v, dx.x[n]);
      }
      store(dx, (T*)a.dx + at + i);
    });
  }

  // The rows of a block have had sums of their own: they are added in order, one after the other.
  if constexpr (kOnChip) {
    for (int turn = 0; turn < launch.rows; ++turn) {
      if (team.row() == turn)
        for_packs<true, V>(team, a.D, [&](int pack, int64_t i) {
          if (dweight_part) add_to(dweight_part, i, dweight[pack], turn == 0);
          if constexpr (kCentred)
            if (dbias_part) add_to(dbias_part, i, dbias[pack], turn == 0);
        });
      if (launch.rows > 1) sync_block();
    }
  }
  team.leave();
}

struct StripesLaunch {
  const float* parts;
  int64_t stripes, D;
  void* out;
};
constexpr int kColumns = 32, kLanes = 8;  // threads of a block: columns, and stripes at a time

template <class T>
__global__ void sum_stripes_kernel(StripesLaunch a) {
  float* sums = (float*)shared_memory();  // [kLanes, kColumns]
  const int lane = int(threadIdx.x) / kColumns, column = int(threadIdx.x) % kColumns;
  const int64_t d = int64_t(blockIdx.x) * kColumns + column;
  float sum = 0;
  if (d < a.D)
    for (int64_t s = lane; s < a.stripes; s += kLanes) sum += a.parts[s * a.D + d];
  sums[threadIdx.x] = sum;
  sync_block();
  if (lane == 0 && d < a.D) {
    for (int other = 1; other < kLanes; ++other) sum += sums[other * kColumns + column];
    narrow(sum, ((T*)a.out)[d]);
  }
}

Error launch_rows(const Norm& a, int V, int most, int64_t stripes, void (*on_chip)(NormLaunch),
                  void (*walking)(NormLaunch), Stream stream) {
  const Share s = share(a.D, V, most, has_clusters());
  const int blocks = s.blocks ? s.blocks : 1;
  const int64_t groups = stripes ? stripes : (a.N + s.rows - 1) / s.rows;
  return launch(s.blocks ? on_chip : walking, Grid{groups * blocks, s.threads * s.rows, kScratchBytes, blocks},
                NormLaunch{a, s.threads, s.rows}, stream);
}

bool wide(const Norm& a, int V) {
  const void* places[] = {a.x, a.residual, a.y, a.h, a.weight.data, a.bias.data, a.dy, a.dh, a.dx};
  bool all = a.D % V == 0;
  for (const void* place : places) all = all && aligned(place);
  return all;
}

template <class T>
Error norm_fwd_of(const Norm& a, Stream stream) {
  constexpr int V = kWide<T>;
  if (!wide(a, V))
    return launch_rows(a, 1, kFwdThreads, 0, norm_fwd_kernel<T, 1, true>, norm_fwd_kernel<T, 1, false>, stream);
  return launch_rows(a, V, kFwdThreads, 0, norm_fwd_kernel<T, V, true>, norm_fwd_kernel<T, V, false>, stream);
}

template <class T, int V, bool kCentred>
Error norm_bwd_as(const Norm& a, Stream stream) {
  return launch_rows(a, V, kBwdThreads<T, kCentred>, a.stripes, norm_bwd_kernel<T, V, true, kCentred>,
                     norm_bwd_kernel<T, V, false, kCentred>, stream);
}
template <class T>
Error norm_bwd_of(const Norm& a, Stream stream) {
  constexpr int V = kWide<T>;
  if (a.mean) return wide(a, V) ? norm_bwd_as<T, V, true>(a, stream) : norm_bwd_as<T, 1, true>(a, stream);
  return wide(a, V) ? norm_bwd_as<T, V, false>(a, stream) : norm_bwd_as<T, 1, false>(a, stream);
}

}  // namespace

Error norm_fwd(Type type, const Norm& a, Stream stream) {
  switch (type) {
    case kFloat:
      return norm_fwd_of<float>(a, stream);
    case kBFloat16:
      return norm_fwd_of<bf16>(a, stream);
    default:
      return norm_fwd_of<half>(a, stream);
  }
}

int64_t norm_bwd_stripes(int64_t N) {
  const int64_t most = 4 * int64_t(multiprocessors());
  return N < most ? N : most;
}

Error norm_bwd(Type type, const Norm& a, Stream stream) {
  switch (type) {
    case kFloat:
      return norm_bwd_of<float>(a, stream);
    case kBFloat16:
      return norm_bwd_of<bf16>(a, stream);
    default:
      return norm_bwd_of<half>(a, stream);
  }
}

Error sum_stripes(const float* parts, int64_t stripes, int64_t D, void* out, Type type, Stream stream) {
  const StripesLaunch a = {parts, stripes, D, out};
  const Grid grid = {(D + kColumns - 1) / kColumns, kColumns * kLanes, kColumns * kLanes * int(sizeof(float))};
  switch (type) {
    case kFloat:
      return launch(sum_stripes_kernel<float>, grid, a, stream);
    case kBFloat16:
      return launch(sum_stripes_kernel<bf16>, grid, a, stream);
    default:
      return launch(sum_stripes_kernel<half>, grid, a, stream);
  }
}

}  // namespace fastllm::cuda
