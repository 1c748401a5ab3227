// Tensors in, checks, threads, table call: linear layers whose weights have fewer bits than their inputs.
#include "cpu/tensors.h"

namespace fastllm::cpu {
namespace {

constexpr int64_t kPanel = 16;            // rows of a packed weight that lie together
constexpr int64_t kGrainBytes = 1 << 16;  // of weights that are worth waking another thread for

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

// x [..., K] in fp32, and y [..., N] like x, which is fp32 while it is computed. Both lie in this thread's workspace
// where x is not fp32, behind `extra` bytes of the caller's.
class Ends {
 public:
  Ends(const char* op, const Tensor& x, WeightOnly& a, Type t, int64_t extra) : type_(t), N_(a.N) {
    shape_ = shape_of(x);
    shape_.back() = a.N;
    y_ = empty(shape_, x.scalar_type());
    char* memory = (char*)workspace(extra + (t == kFloat ? 0 : (a.M * (a.K + a.N)) * 4) + 64);
    extra_ = memory;
    float* wide = (float*)(memory + (extra + 63) / 64 * 64);
    a.x = t == kFloat ? (const float*)x.data_ptr() : wide;
    a.y = t == kFloat ? (float*)y_.data_ptr() : wide + a.M * a.K;
    a.x_row = a.K;
    a.y_row = a.N;
    if (t != kFloat) kernels().weight_only->widen[t](x.data_ptr(), wide, a.M * a.K);
  }
  void* extra() const { return extra_; }
  // Rounds columns [begin, end) of y to x's type.
  void narrow(const WeightOnly& a, int64_t begin, int64_t end) const {
    if (type_ == kFloat) return;
    for (int64_t m = 0; m < a.M; ++m)
      kernels().weight_only->narrow[type_](a.y + m * N_ + begin, (char*)y_.data_ptr() + (m * N_ + begin) * 2,
                                           end - begin);
  }
  const Tensor& y() const { return y_; }

 private:
  Type type_;
  int64_t N_;
  std::vector<int64_t> shape_;
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
  const Ends ends(op, x, a, t, 0);
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
  a.planes = t == kFloat ? 3 : 2;  // what is rounded to 8 or 11 bits in the end needs no 24 on the way
  const InComputeType b(bias, kFloat, op);
  a.bias = (const float*)b.data();
  const Ends ends(op, x, a, t, kernels().weight_only->bytes(a));
  if (!a.M) return ends.y();
  kernels().weight_only->prepare(a, ends.extra());
  const auto kernel = kernels().weight_only->panels[bits == 8];
  for_range(packed.panels, kGrainBytes / (a.K * bits * 2) + 1, [&](int64_t begin, int64_t end) {
    kernel(a, ends.extra(), begin, end);
    ends.narrow(a, begin * kPanel, std::min(end * kPanel, a.N));
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
