// Tensors in, checks, threads, table call: linear layers whose weights have fewer bits than their inputs.
#include "cpu/gemm.h"
#include "cpu/tensors.h"

namespace fastllm::cpu {
namespace {

constexpr int64_t kPanel = 16;            // rows of a packed weight that lie together
constexpr int64_t kGrainBytes = 1 << 16;  // of weights that are worth waking another thread for
// Rows of x that the kernels of decoding read every weight once for, and of the gradient of y. More are a product.
constexpr int64_t kFewRows = 16, kFewRowsOfGradient = 8;
constexpr int64_t kBlockColumns = 384, kBlockDepth = 192;  // of a weight that is unpacked for a product: 288 KB
constexpr int64_t kNarrowColumns = 128;                    // where a block is as deep as the weight
constexpr int64_t kWorthAThread = 1 << 18;                 // multiplications and additions

struct Packed {  // a packed weight, checked
  WeightOnly a{};
  int64_t panels = 0;
  Packed(const char* op, const Tensor& codes, const Tensor& scales, const MaybeTensor& offsets, int64_t rows,
         int64_t columns, int64_t bits, int64_t group) {
    CHECK((bits == 8 || bits == 4) && group > 0 && group % 32 == 0 && rows > 0 && columns > 0, op,
          ": bits must be 8 or 4, and group a multiple of 32");
    panels = (rows + kPanel - 1) / kPanel;
    const int64_t groups = (columns + group - 1) / group;
    CHECK(codes.scalar_type() == ScalarType::Int && codes.is_contiguous() && codes.dim() == 3 &&
              codes.size(0) == panels && codes.size(1) == groups * group * bits / 32 && codes.size(2) == kPanel,
          op, ": codes must be contiguous int32 [", panels, ", ", groups * group * bits / 32, ", 16]");
    const ScalarType wanted = bits == 8 ? ScalarType::Float : ScalarType::BFloat16;
    auto fits = [&](const Tensor& x) {
      return x.scalar_type() == wanted && x.is_contiguous() && x.numel() == panels * groups * kPanel;
    };
    CHECK(fits(scales) && (!offsets || fits(*offsets)), op,
          ": scales and offsets must be contiguous [panels, groups, 16], fp32 for 8 bits, bf16 for 4");
    a.N = rows;
    a.K = columns;
    a.bits = bits;
    a.group = group;
    a.weight = codes.data_ptr();
    a.scales = scales.data_ptr();
    a.offsets = offsets ? offsets->data_ptr() : nullptr;
  }
};

Tensor output(const Tensor& x, int64_t columns) {  // [..., columns], like x
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = columns;
  return empty(shape, x.scalar_type());
}

// x in fp32, and y [..., columns] like x, which is fp32 while it is computed. Both lie in this thread's workspace where
// x is not fp32, behind `extra` bytes of the caller's.
class Ends {
 public:
  Ends(const Tensor& x, WeightOnly& a, Type t, int64_t columns, int64_t extra)
      : type_(t), columns_(columns), y_(output(x, columns)) {
    const int64_t inputs = x.numel();
    char* memory = (char*)workspace(extra + (t == kFloat ? 0 : (inputs + a.M * columns) * 4) + 64);
    extra_ = memory;
    float* wide = (float*)(memory + (extra + 63) / 64 * 64);
    a.x = t == kFloat ? (const float*)x.data_ptr() : wide;
    a.y = t == kFloat ? (float*)y_.data_ptr() : wide + inputs;
    a.x_row = x.size(-1);
    a.y_row = columns;
    if (t != kFloat) kernels().weight_only->widen[t](x.data_ptr(), wide, inputs);
  }
  void* extra() const { return extra_; }
  // Rounds columns [begin, end) of y to x's type.
  void narrow(const WeightOnly& a, int64_t begin, int64_t end) const {
    if (type_ == kFloat) return;
    for (int64_t m = 0; m < a.M; ++m)
      kernels().weight_only->narrow[type_](a.y + m * columns_ + begin,
                                           (char*)y_.data_ptr() + (m * columns_ + begin) * 2, end - begin);
  }
  const Tensor& y() const { return y_; }

 private:
  Type type_;
  int64_t columns_;
  Tensor y_;
  void* extra_;
};

Type check_x(const char* op, const Tensor& x, int64_t K) {
  const Type t = type_of(x, op);
  CHECK(t != kDouble && x.is_contiguous() && x.dim() >= 1 && x.size(-1) == K, op, ": x must be contiguous [..., ", K,
        "] in fp32, bf16 or fp16");
  return t;
}
void check_bias(const char* op, const MaybeTensor& bias, int64_t N) {
  CHECK(!bias || bias->numel() == N, op, ": bias must have ", N, " elements");
}

// y = x w^T + bias, or y = x w, as a matrix product for which w is unpacked block by block, in the panels that the
// product would copy it into. A block lies in a thread's cache; in 16 bits it is as deep as the sums, rounded once, are
// long.
Tensor product(const Packed& packed, const Tensor& x, Type t, bool transposed, const void* bias) {
  const WeightOnly& a = packed.a;
  const LinearKernels& linear = *kernels().linear;
  const int64_t depth = transposed ? a.K : a.N, columns = transposed ? a.N : a.K, M = a.M;
  const Tensor y = output(x, columns);
  const int64_t most = t == kFloat ? std::min(kBlockDepth, depth) : depth, width = linear.panel[t]();
  const int64_t threads = M * columns * depth < kWorthAThread ? 1 : torch::stable::get_num_threads();
  const int64_t together = t == kFloat ? kBlockColumns : kNarrowColumns;
  const int64_t share = std::min(together, ((columns + threads - 1) / threads + 63) / 64 * 64);
  const auto unpack =
      (transposed ? kernels().weight_only->transposed_block : kernels().weight_only->block)[a.bits == 8];
  const Gemm largest{M, share, most};
  const int64_t unpacked = (most * (share + width) * 4 + 63) / 64 * 64;
  for_items((columns + share - 1) / share, unpacked + linear.gemm_bytes[t](largest), threads > 1,
            [&](int64_t item, void* memory) {
              const int64_t from = item * share, n = std::min(share, columns - from), size = bytes_of(t);
              for (int64_t k = 0; k < depth; k += most) {
                const int64_t deep = std::min(most, depth - k);
                unpack(a, transposed ? WeightBlock{from, n, k, deep} : WeightBlock{k, deep, from, n}, (float*)memory,
                       width);
                Gemm part{M, n, deep};
                part.a = {(const char*)x.data_ptr() + k * size, depth, 1};
                part.b.data = memory;
                part.c = (char*)y.data_ptr() + from * size;
                part.c_row = columns;
                part.add = k > 0;
                part.bias = bias && k + deep == depth ? (const char*)bias + from * size : nullptr;
                part.panels = true;
                linear.gemm[t](part, 0, M, 0, n, (char*)memory + unpacked);
              }
            });
  return y;
}

}  // namespace

Tensor weight_only_linear_fwd(Tensor x, Tensor weight, MaybeTensor bias) {
  const char* op = "weight_only_linear_fwd";
  CHECK(weight.dim() == 2 && weight.is_contiguous(), op, ": weight must be contiguous [N, K]");
  WeightOnly a{};
  a.N = weight.size(0);
  a.K = weight.size(1);
  const Type t = check_x(op, x, a.K), stored = type_of(weight, op);
  CHECK(stored != kDouble, op, ": weight must be fp32, bf16 or fp16");
  check_bias(op, bias, a.N);
  a.M = a.K ? x.numel() / a.K : 0;
  a.weight = weight.data_ptr();
  const InComputeType b(bias, kFloat, op);
  a.bias = (const float*)b.data();
  const Ends ends(x, a, t, a.N, 0);
  if (!a.M) return ends.y();
  const auto kernel = kernels().weight_only->rows[stored];
  for_range(a.N, kGrainBytes / (a.K * (stored == kFloat ? 4 : 2)) + 4, [&](int64_t begin, int64_t end) {
    kernel(a, begin, end);
    ends.narrow(a, begin, end);
  });
  return ends.y();
}

Tensor quantized_linear_fwd(Tensor x, Tensor codes, Tensor scales, MaybeTensor offsets, MaybeTensor bias, int64_t rows,
                            int64_t bits, int64_t group) {
  const char* op = "quantized_linear_fwd";
  CHECK(x.dim() >= 1, op, ": x must be [..., K]");
  Packed packed(op, codes, scales, offsets, rows, x.size(-1), bits, group);
  WeightOnly& a = packed.a;
  const Type t = check_x(op, x, a.K);
  check_bias(op, bias, a.N);
  a.M = x.numel() / a.K;
  if (a.M > kFewRows) {
    if (bias) bias = torch::stable::contiguous(torch::stable::to(*bias, x.scalar_type()));
    return product(packed, x, t, true, bias ? bias->data_ptr() : nullptr);
  }
  a.planes = t == kFloat ? 3 : 2;  // what is rounded to 8 or 11 bits in the end needs no 24 on the way
  const InComputeType b(bias, kFloat, op);
  a.bias = (const float*)b.data();
  const Ends ends(x, a, t, a.N, kernels().weight_only->bytes(a));
  if (!a.M) return ends.y();
  kernels().weight_only->prepare(a, ends.extra());
  const auto kernel = kernels().weight_only->panels[bits == 8];
  for_range(packed.panels, kGrainBytes / (a.K * bits * 2) + 1, [&](int64_t begin, int64_t end) {
    kernel(a, ends.extra(), begin, end);
    ends.narrow(a, begin * kPanel, std::min(end * kPanel, a.N));
  });
  return ends.y();
}

Tensor quantized_linear_bwd(Tensor dy, Tensor codes, Tensor scales, MaybeTensor offsets, int64_t columns, int64_t bits,
                            int64_t group) {
  const char* op = "quantized_linear_bwd";
  CHECK(dy.dim() >= 1, op, ": dy must be [..., N]");
  Packed packed(op, codes, scales, offsets, dy.size(-1), columns, bits, group);
  WeightOnly& a = packed.a;
  const Type t = check_x(op, dy, a.N);
  a.M = dy.numel() / a.N;
  if (a.M > kFewRowsOfGradient) return product(packed, dy, t, false, nullptr);
  const Ends ends(dy, a, t, a.K, 0);
  if (!a.M) return ends.y();
  const auto kernel = kernels().weight_only->columns[bits == 8];
  const int64_t step = group % 64 ? 32 : 64, steps = (a.K + step - 1) / step;
  for_range(steps, kGrainBytes / (a.N * bits * step / 8) + 1, [&](int64_t begin, int64_t end) {
    kernel(a, begin * step, end * step);
    ends.narrow(a, begin * step, std::min(end * step, a.K));
  });
  return ends.y();
}

Tensor dequantize_fwd(Tensor codes, Tensor scales, MaybeTensor offsets, Tensor like, int64_t begin, int64_t end,
                      int64_t rows, int64_t columns, int64_t bits, int64_t group) {
  const char* op = "dequantize_fwd";
  const Packed packed(op, codes, scales, offsets, rows, columns, bits, group);
  const Type t = type_of(like, op);
  CHECK(t != kDouble && begin >= 0 && begin <= end && end <= rows && begin % kPanel == 0, op,
        ": begin and end must be rows, begin a multiple of 16, and `like` fp32, bf16 or fp16");
  const Tensor out = empty({end - begin, columns}, like.scalar_type());
  WeightOnly a = packed.a;
  a.N = end;
  const int64_t first = begin / kPanel, panels = (end + kPanel - 1) / kPanel - first, size = t == kFloat ? 4 : 2;
  const auto kernel = kernels().weight_only->dequantize[t];
  for_range(panels, kGrainBytes / (columns * kPanel * size) + 1, [&](int64_t from, int64_t to) {
    kernel(a, first + from, first + to, (char*)out.data_ptr() + from * kPanel * columns * size);
  });
  return out;
}

}  // namespace fastllm::cpu
