// Attention, backward: the gradients of q, k, v, of the bias and of the sink, without atomics.
//
// With p = exp(s - lse), dp = do v^T and ds = p (dp - delta):  dv = p^T do,  dq = scale ds k,  dk = scale ds^T q.
// One kernel holds a block of queries and walks over keys, for dq; the same one, with the roles exchanged, holds a
// block of keys and walks over queries, for dk and dv. What it holds are the rows of its products, so that p and ds are
// in registers where the next product wants its left operand. Source: Dao 2023, arXiv:2307.08691.
#include "cuda/attention.cuh"
#include "cuda/row.cuh"

namespace fastllm::cuda {
namespace {

constexpr int kRowsWarps = 4;

// lse and delta of a query; one warp each.
template <class T>
__global__ void __launch_bounds__(32 * kRowsWarps) attention_bwd_rows_kernel(Attention a) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t row = int64_t(blockIdx.x) * kRowsWarps + int(threadIdx.x) / 32, rows = int64_t(a.B) * a.H * a.T;
  const bool inside = row < rows;
  const int64_t bh = inside ? row / a.T : 0, i = inside ? row % a.T : 0;
  const Head at = {int(bh / a.H), int(bh % a.H)};
  const T *o = head_of<T>(a.o, at) + i * a.o.t, *grad_o = head_of<T>(a.grad_o, at) + i * a.grad_o.t;
  float delta = 0;
  for (int d = lane; d < a.Dv; d += 32) delta += widen(o[d]) * widen(grad_o[d]);
  for (int distance = 16; distance; distance /= 2) delta += shuffle_xor(delta, distance);
  if (inside && lane == 0) {
    const double lse = a.lse[row];
    if (a.dlse) delta -= float(a.dlse[row]);
    a.rows[row] = lse == -INFINITY ? QueryRow{INFINITY, 0.0f} : QueryRow{float(lse * 1.4426950408889634), delta};
  }
}

template <int kD, bool kKeysHeld>
struct Backward {
  static constexpr int kWarps = 8, kThreads = 32 * kWarps;
  static constexpr int kHeld = 16 * kWarps;
  static constexpr int kWalked = kD == 128 && kKeysHeld ? 32 : 64;
  static constexpr int kRowBytes = kKeysHeld ? kWalked * int(sizeof(QueryRow)) : 0;
  static constexpr int bytes(int stages) { return 2 * kHeld * kD * 2 + stages * (2 * kWalked * kD * 2 + kRowBytes); }
};

struct BackwardLaunch {
  Attention a;
  int stages;  // 2: the next tiles are on the way while these are used; 1 where shared memory does not allow it
};

template <class T, int kD, bool kScored, bool kKeysHeld>
__global__ void __launch_bounds__(Backward<kD, kKeysHeld>::kThreads, 1) attention_bwd_kernel(BackwardLaunch launch) {
  using K = Backward<kD, kKeysHeld>;
  constexpr int kHeld = K::kHeld, kWalked = K::kWalked, kN = kWalked / 8;
  const Attention& a = launch.a;
  // Held: q and do, or k and v. Walked over: the other two.
  using Tile = cuda::Tile<T, kD>;
  const Tile held0 = {0}, held1 = {kHeld * Tile::kRowBytes};
  const auto stage_of = [&](int n) { return n & (launch.stages - 1); };
  const auto walked0 = [&](int n) { return Tile{uint32_t((2 * kHeld + stage_of(n) * 2 * kWalked) * Tile::kRowBytes)}; };
  const auto walked1 = [&](int n) { return Tile{walked0(n).at + kWalked * Tile::kRowBytes}; };
  QueryRow* const walked_rows =
      (QueryRow*)(shared_memory() + (2 * kHeld + launch.stages * 2 * kWalked) * Tile::kRowBytes);

  const int G = a.H / a.Hkv, held = kKeysHeld ? a.S : a.T, walked = kKeysHeld ? a.T : a.S;
  const int blocks = (held + kHeld - 1) / kHeld, heads = kKeysHeld ? a.Hkv : a.H, bh = int(blockIdx.x) / blocks;
  const int start = (kKeysHeld ? int(blockIdx.x) % blocks : blocks - 1 - int(blockIdx.x) % blocks) * kHeld;
  const int row = int(threadIdx.x) / 32 * 16, lane = int(threadIdx.x) % 32;
  const Head at = {bh / heads, bh % heads};
  Walk walk;
  if constexpr (kKeysHeld)
    walk = walk_queries<kHeld, kWalked>(a, start);
  else
    walk = walk_keys<kHeld, kWalked>(a, start);
  const int steps = walk.blocks * (kKeysHeld ? G : 1);

  // A step: a place in what is walked over, of one head. With keys held, all query heads of a key head are walked.
  struct Step {
    int h, place;
  };
  const auto after = [&](Step step) {
    step.place += kWalked;
    if (kKeysHeld && step.place >= walk.start + walk.blocks * kWalked) step = {step.h + 1, walk.start};
    return step;
  };
  const auto fetch_walked = [&](int n, Step step) {
    const Head from = {at.b, step.h};
    const Heads &x0 = kKeysHeld ? a.q : a.k, &x1 = kKeysHeld ? a.grad_o : a.v;
    fetch<kWalked, K::kThreads>(walked0(n), head_of<T>(x0, from), x0.t, step.place, walked, a.D);
    fetch<kWalked, K::kThreads>(walked1(n), head_of<T>(x1, from), x1.t, step.place, walked, a.Dv);
    if (kKeysHeld && threadIdx.x < kWalked) {
      const int i = step.place + int(threadIdx.x);
      const QueryRow none = {INFINITY, 0.0f};
      walked_rows[stage_of(n) * kWalked + threadIdx.x] =
          i < a.T ? a.rows[(int64_t(from.b) * a.H + from.h) * a.T + i] : none;
    }
  };

  QueryRow held_rows[2] = {{INFINITY, 0.0f}, {INFINITY, 0.0f}};
  if constexpr (!kKeysHeld)
    for (int half = 0; half < 2; ++half) {
      const int i = start + row + half * 8 + lane / 4;
      if (i < a.T) held_rows[half] = a.rows[int64_t(bh) * a.T + i];
    }

  float sum0[1][kD / 8][4] = {};                  // dq or dk, over scale
  float sum1[1][kKeysHeld ? kD / 8 : 1][4] = {};  // dv
  Step step = {kKeysHeld ? at.h * G : at.h / G, walk.start};
  if (steps) {
    const Heads &x0 = kKeysHeld ? a.k : a.q, &x1 = kKeysHeld ? a.v : a.grad_o;
    fetch<kHeld, K::kThreads>(held0, head_of<T>(x0, at), x0.t, start, held, a.D);
    fetch<kHeld, K::kThreads>(held1, head_of<T>(x1, at), x1.t, start, held, a.Dv);
    fetch_walked(0, step);
    close_copy_group();
  }
  for (int n = 0; n < steps; ++n) {
    const Step next = after(step);
    if (launch.stages > 1) {
      if (n + 1 < steps) fetch_walked(n + 1, next);
      close_copy_group();
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    sync_block();
    const Head query = {at.b, kKeysHeld ? step.h : at.h};
    const float slope = slope_of(a, query);
    const QueryRow* const rows = walked_rows + stage_of(n) * kWalked;

    float p[1][kN][4] = {}, ds[1][kN][4] = {};
    multiply_by_transposed(p, held0, row, walked0(n));
    multiply_by_transposed(ds, held1, row, walked1(n));
    const bool test = walk.needs_test(step.place, kWalked);
#pragma unroll
    for (int c = 0; c < kN; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = start + row + e / 2 * 8 + lane / 4, column = c * 8 + lane % 4 * 2 + e % 2;
        const int i = kKeysHeld ? step.place + column : r, j = kKeysHeld ? r : step.place + column;
        const QueryRow of = kKeysHeld ? rows[column] : held_rows[e / 2];
        float capped = 0, s = score<kScored>(p[0][c][e], a, query, slope, i, j, &capped);
        if (test && !sees(a, i, j)) s = -INFINITY;
        p[0][c][e] = exp2_approximate(s - of.lse);
        float d = p[0][c][e] * (ds[0][c][e] - of.delta);
        if constexpr (kScored) {
          if (!kKeysHeld && a.dbias.data && i < a.T && j < a.S) {
            const int64_t to = place(a.dbias, query, i, j);
            if (a.dbias.type == kFloat)
              ((float*)a.dbias.data)[to] = d;
            else
              narrow(d, ((T*)a.dbias.data)[to]);
          }
          d *= 1.0f - capped * capped;
        }
        ds[0][c][e] = d;
      }
    if constexpr (kKeysHeld) multiply(sum1, p, walked1(n));
    multiply(sum0, ds, walked0(n));
    sync_block();  // nobody needs these tiles any more
    if (launch.stages == 1) {
      if (n + 1 < steps) fetch_walked(n + 1, next);
      close_copy_group();
    }
    step = next;
  }

  const Heads& to = kKeysHeld ? a.dk : a.dq;
  store_rows(sum0, head_of<T>(to, at), to.t, start + row, held, a.D, a.scale);
  if constexpr (kKeysHeld) store_rows(sum1, head_of<T>(a.dv, at), a.dv.t, start + row, held, a.Dv, 1.0f);
}

// dsink = -sum of p_sink * delta over batch and queries: the sink is a score with dp = 0. One block a head.
constexpr int kSinkThreads = 256;
__global__ void __launch_bounds__(kSinkThreads) attention_bwd_sink_kernel(Attention a) {
  Team team(kSinkThreads);
  const int h = int(blockIdx.x);
  const float sink = number(a.sink, h) * kLog2E;
  float sum[1] = {0};
  for (int64_t n = team.rank(); n < int64_t(a.B) * a.T; n += kSinkThreads) {
    const QueryRow of = a.rows[(n / a.T * a.H + h) * a.T + n % a.T];
    sum[0] -= exp2_approximate(sink - of.lse) * of.delta;
  }
  team.reduce(sum, Sum());
  if (team.rank() == 0) {
    if (a.sink.type == kFloat)
      ((float*)a.dsink)[h] = sum[0];
    else if (a.sink.type == kBFloat16)
      narrow(sum[0], ((bf16*)a.dsink)[h]);
    else
      narrow(sum[0], ((half*)a.dsink)[h]);
  }
}

template <class T, int kD, bool kScored, bool kKeysHeld>
Error launch_held(const Attention& a, Stream stream) {
  using K = Backward<kD, kKeysHeld>;
  const int64_t held = kKeysHeld ? a.S : a.T, heads = int64_t(a.B) * (kKeysHeld ? a.Hkv : a.H);
  const int stages = K::bytes(2) <= most_shared_bytes() ? 2 : 1;
  return launch(attention_bwd_kernel<T, kD, kScored, kKeysHeld>,
                Grid{(held + K::kHeld - 1) / K::kHeld * heads, K::kThreads, K::bytes(stages)},
                BackwardLaunch{a, stages}, stream);
}
template <class T, int kD, bool kScored>
Error launch_both(const Attention& a, Stream stream) {
  Error error = a.T ? launch_held<T, kD, kScored, false>(a, stream) : nullptr;
  if (!error && a.S) error = launch_held<T, kD, kScored, true>(a, stream);
  return error;
}
template <class T>
Error attention_bwd_of(const Attention& a, Stream stream) {
  const int64_t rows = int64_t(a.B) * a.H * a.T;
  Error error = nullptr;
  if (rows)
    error =
        launch(attention_bwd_rows_kernel<T>, Grid{(rows + kRowsWarps - 1) / kRowsWarps, 32 * kRowsWarps}, a, stream);
  if (error) return error;
  if ((a.D > a.Dv ? a.D : a.Dv) <= 64)
    error = is_scored(a) ? launch_both<T, 64, true>(a, stream) : launch_both<T, 64, false>(a, stream);
  else
    error = is_scored(a) ? launch_both<T, 128, true>(a, stream) : launch_both<T, 128, false>(a, stream);
  if (!error && a.dsink) error = launch(attention_bwd_sink_kernel, Grid{a.H, kSinkThreads, kScratchBytes}, a, stream);
  return error;
}

}  // namespace

Error attention_bwd(Type type, const Attention& a, Stream stream) {
  return type == kBFloat16 ? attention_bwd_of<bf16>(a, stream) : attention_bwd_of<half>(a, stream);
}

}  // namespace fastllm::cuda
