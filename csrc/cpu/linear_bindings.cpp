// Tensors in, checks, threads, table call: linear, and the matrix product for other ops.
#include "cpu/gemm.h"
#include "cpu/tensors.h"

namespace fastllm::cpu {
namespace {

constexpr int64_t kWorthAThread = 1 << 18;  // multiplications and additions: some 10 us of one core
constexpr int64_t kFewRows = 16;            // that are multiplied with b where it lies, in 16-bit types

// How a product is cut: into `down` x `across` pieces of whole tiles, one a thread.
struct Cut {
  int64_t down, across, rows, columns;  // pieces, and the size of one
};
constexpr int64_t kTileRows = 24, kTileColumns = 64;  // multiples of every instruction set's tile

int64_t share(int64_t size, int64_t parts, int64_t tile) {
  return ((size + tile - 1) / tile + parts - 1) / parts * tile;
}
Cut across(const Gemm& g, int64_t threads) { return {1, threads, g.M, share(g.N, threads, kTileColumns)}; }
Cut cut(const Gemm& g, int64_t threads) {
  Cut best{1, 1, g.M, g.N};
  double least = 0;
  for (int64_t down = 1; down <= threads; ++down) {
    const Cut c{down, threads / down, share(g.M, down, kTileRows), share(g.N, threads / down, kTileColumns)};
    // What the slowest thread does: its products, and the packing of its columns and reading of its rows.
    const double cost = double(c.rows) * c.columns + 24.0 * c.columns + 8.0 * c.rows;
    if (down == 1 || cost < least) best = c, least = cost;
  }
  return best;
}

// A matrix [rows, columns] that may be a transposed one.
Operand operand(const Tensor& x, int64_t rows, int64_t columns, const char* op, const char* name) {
  if (x.is_contiguous()) return {x.data_ptr(), columns, 1};
  CHECK(x.dim() == 2 && (x.stride(0) == 1 || x.stride(1) == 1), op, ": ", name,
        " must be contiguous, or 2-D with stride 1 in one dimension");
  return {x.data_ptr(), x.stride(0), x.stride(1)};
}
Operand transposed(Operand x) { return {x.data, x.column, x.row}; }

// The sizes of y [M, N] = x [M, K] times the transpose of weight [N, K].
struct Sizes {
  Type type;
  int64_t M, N, K;
  Sizes(const Tensor& x, const Tensor& weight, const char* op) {
    type = type_of(x, op);
    CHECK(weight.dim() == 2 && weight.scalar_type() == x.scalar_type(), op, ": weight must be [N, K] of x's dtype");
    N = weight.size(0), K = weight.size(1);
    CHECK(x.dim() >= 1 && x.size(-1) == K, op, ": x must be [..., ", K, "]");
    M = 1;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) M *= x.size(i);
  }
};

// out[n] = sum over the rows of dy [M, N].
void sum_rows(const Tensor& dy, const Sizes& s, const Tensor& out) {
  const bool wide = s.type == kDouble;
  const int64_t stripes = stripes_of(s.M), bytes = s.N * (wide ? 8 : 4);
  const std::unique_ptr<char[]> partial(new char[stripes * bytes]());
  for_stripes(s.M, s.N, [&](int64_t stripe, int64_t begin, int64_t end) {
    kernels().linear->add_rows[s.type](dy.data_ptr(), s.N, begin, end, partial.get() + stripe * bytes);
  });
  sum_stripes(partial.get(), wide ? kDouble : kFloat, stripes, s.N, out, "linear_bwd");
}

}  // namespace

void gemm(const Gemm& g, Type type, int64_t threads) {
  if (!g.M || !g.N) return;
  const LinearKernels& linear = *kernels().linear;
  const bool few = linear.few_rows[type] && g.M <= kFewRows && g.a.column == 1 && g.b.row == 1;
  const GemmKernel kernel = (few ? linear.few_rows : linear.gemm)[type];
  const int64_t bytes = (few ? linear.few_rows_bytes : linear.gemm_bytes)[type](g);
  const int64_t worth = 1 + int64_t(double(g.M) * g.N * g.K / kWorthAThread);
  if (!threads) threads = torch::stable::get_num_threads();
  threads = std::min(threads, worth);
  const Cut c = few ? across(g, threads) : cut(g, threads);
  for_items(c.down * c.across, bytes, threads > 1, [&](int64_t item, void* memory) {
    const int64_t m = item / c.across * c.rows, n = item % c.across * c.columns;
    kernel(g, m, std::min(g.M, m + c.rows), n, std::min(g.N, n + c.columns), memory);
  });
}

namespace {

// y = x W^T + bias, as far as a Gemm holds it: what c is, and what becomes of it, is left open.
Gemm product_of(const char* op, const Sizes& s, const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  CHECK(!bias || (bias->numel() == s.N && bias->is_contiguous() && bias->scalar_type() == x.scalar_type()), op,
        ": bias must be contiguous, [", s.N, "] of x's dtype");
  Gemm g{s.M, s.N, s.K};
  g.a = operand(x, s.M, s.K, op, "x");
  g.b = transposed(operand(weight, s.N, s.K, op, "weight"));
  g.c_row = s.N;
  g.bias = bias ? bias->data_ptr() : nullptr;
  return g;
}
std::vector<int64_t> output_shape(const Tensor& x, const Sizes& s) {
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = s.N;
  return shape;
}

// A matrix that is written into, as rows of `out`.
void* rows_of(const Tensor& out, const Sizes& s, int64_t rows, int64_t columns, const char* op, const char* name) {
  CHECK(out.is_contiguous() && out.numel() == rows * columns && type_of(out, op) == s.type, op, ": ", name,
        " must be contiguous, [", rows, ", ", columns, "] of x's dtype");
  return out.data_ptr();
}

}  // namespace

Tensor linear_fwd(Tensor x, Tensor weight, MaybeTensor bias) {
  const Sizes s(x, weight, "linear_fwd");
  Gemm g = product_of("linear_fwd", s, x, weight, bias);
  const Tensor y = empty(output_shape(x, s), x.scalar_type());
  g.c = y.data_ptr();
  gemm(g, s.type);
  return y;
}

void linear_out(Tensor x, Tensor weight, MaybeTensor bias, Tensor out) {
  const Sizes s(x, weight, "linear_out");
  Gemm g = product_of("linear_out", s, x, weight, bias);
  g.c = rows_of(out, s, s.M, s.N, "linear_out", "out");
  gemm(g, s.type);
}

std::tuple<Tensor, Tensor> linear_act_fwd(Tensor x, Tensor weight, MaybeTensor bias, int64_t activation, bool needs_z) {
  const char* op = "linear_act_fwd";
  CHECK(activation >= kRelu && activation <= kSilu, op, ": there is no activation ", activation);
  const Sizes s(x, weight, op);
  Gemm g = product_of(op, s, x, weight, bias);
  const std::vector<int64_t> shape = output_shape(x, s);
  const Tensor y = empty(shape, x.scalar_type()), z = needs_z ? empty(shape, x.scalar_type()) : none_like(x);
  g.y = y.data_ptr(), g.c = needs_z ? z.data_ptr() : g.y;
  g.activation = int(activation);
  gemm(g, s.type);
  return {y, z};
}

void linear_bwd_out(Tensor dy, Tensor x, Tensor weight, MaybeTensor dx, MaybeTensor dweight, bool add) {
  const char* op = "linear_bwd_out";
  const Sizes s(x, weight, op);
  CHECK(dy.numel() == s.M * s.N && dy.is_contiguous() && dy.scalar_type() == x.scalar_type(), op,
        ": dy must be contiguous, like y");
  const Operand grad{dy.data_ptr(), s.N, 1};
  if (dx)
    gemm({s.M, s.K, s.N, grad, operand(weight, s.N, s.K, op, "weight"), rows_of(*dx, s, s.M, s.K, op, "dx"), s.K},
         s.type);
  if (dweight)
    gemm({s.N, s.K, s.M, transposed(grad), operand(x, s.M, s.K, op, "x"), rows_of(*dweight, s, s.N, s.K, op, "dweight"),
          s.K, add},
         s.type);
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd(Tensor dy, Tensor x, Tensor weight, bool needs_dx, bool needs_dweight,
                                              bool needs_dbias) {
  const Sizes s(x, weight, "linear_bwd");
  CHECK(dy.numel() == s.M * s.N && dy.is_contiguous() && dy.scalar_type() == x.scalar_type(),
        "linear_bwd: dy must be contiguous, like y");
  const Operand grad{dy.data_ptr(), s.N, 1};
  const Tensor dx = needs_dx ? empty(shape_of(x), x.scalar_type()) : none_like(x);
  const Tensor dweight = needs_dweight ? empty({s.N, s.K}, x.scalar_type()) : none_like(x);
  const Tensor dbias = empty({needs_dbias ? s.N : 0}, x.scalar_type());
  if (needs_dx)
    gemm({s.M, s.K, s.N, grad, operand(weight, s.N, s.K, "linear_bwd", "weight"), dx.data_ptr(), s.K}, s.type);
  if (needs_dweight)
    gemm({s.N, s.K, s.M, transposed(grad), operand(x, s.M, s.K, "linear_bwd", "x"), dweight.data_ptr(), s.K}, s.type);
  if (needs_dbias) sum_rows(dy, s, dbias);
  return {dx, dweight, dbias};
}

}  // namespace fastllm::cpu
