// Tensors in, checks, threads, table call: gated activations, and those after a bias.
#include "cpu/tensors.h"

namespace fastllm::cpu {
namespace {

// Pieces of the work start at multiples of this: whole cache lines of every type.
constexpr int64_t kPiece = 64;

// gate and up as [N, D] with rows at any distance. Where both are dense, or a row is short, one long row is the same.
struct GatedRows {
  Type type;
  int64_t N;
  Gated a{};
};
int64_t row_stride(const Tensor& x, const char* op, const char* name) {
  if (x.is_contiguous()) return x.size(-1);
  bool regular = x.stride(-1) == 1;
  for (int64_t i = 0; i + 2 < x.dim(); ++i) regular &= x.stride(i) == x.stride(i + 1) * x.size(i + 1);
  CHECK(regular, op, ": ", name, " must have dense rows at one distance from each other");
  return x.stride(-2);
}
GatedRows gated_rows(const char* op, const Tensor& gate, const MaybeTensor& up, int activation) {
  CHECK(gate.dim() >= 1 && gate.size(-1) > 0, op, ": gate must be [..., D] with D >= 1");
  GatedRows r;
  r.type = type_of(gate, op);
  Gated& a = r.a;
  a.activation = activation;
  a.D = gate.size(-1);
  a.gate = gate.data_ptr();
  a.gate_stride = row_stride(gate, op, "gate");
  a.up_stride = a.gate_stride;
  if (up) {
    CHECK(shape_of(*up) == shape_of(gate) && up->scalar_type() == gate.scalar_type(), op, ": up must be like gate");
    a.up = up->data_ptr();
    a.up_stride = row_stride(*up, op, "up");
  } else {
    CHECK(a.D % 2 == 0, op, ": without up, the last dimension of gate must be even");
    a.D /= 2;
    a.up = (const char*)a.gate + a.D * bytes_of(r.type);
  }
  r.N = gate.numel() / gate.size(-1);
  a.grad_stride = up ? a.D : 2 * a.D;
  if (a.gate_stride == a.D && a.up_stride == a.D && r.N) {
    a.D = a.gate_stride = a.up_stride = a.grad_stride = r.N * a.D;
    r.N = 1;
  }
  return r;
}
std::vector<int64_t> half_of(std::vector<int64_t> shape, bool packed) {
  if (packed) shape.back() /= 2;
  return shape;
}

template <class Kernel, class Arguments>
void run_elements(Kernel kernel, const Arguments& a, int64_t elements) {
  for_range((elements + kPiece - 1) / kPiece, kGrain / kPiece,
            [&](int64_t begin, int64_t end) { kernel(a, begin * kPiece, std::min(end * kPiece, elements)); });
}

Tensor gated_fwd(const char* op, const Tensor& gate, const MaybeTensor& up, int activation) {
  GatedRows r = gated_rows(op, gate, up, activation);
  const Tensor y = empty(half_of(shape_of(gate), !up), gate.scalar_type());
  r.a.y = y.data_ptr();
  run_elements(kernels().activation->gated_fwd[r.type], r.a, r.N * r.a.D);
  return y;
}

std::tuple<Tensor, Tensor> gated_bwd(const char* op, const Tensor& dy, const Tensor& gate, const MaybeTensor& up,
                                     int activation) {
  GatedRows r = gated_rows(op, gate, up, activation);
  CHECK(dy.is_contiguous() && dy.numel() == r.N * r.a.D && dy.scalar_type() == gate.scalar_type(), op,
        ": dy must be contiguous, with the shape and dtype of the output");
  const Tensor dgate = empty(shape_of(gate), gate.scalar_type());
  const Tensor dup = up ? empty(shape_of(gate), gate.scalar_type()) : none_like(gate);
  r.a.dy = dy.data_ptr();
  r.a.dgate = dgate.data_ptr();
  r.a.dup = up ? dup.data_ptr() : (char*)r.a.dgate + r.a.D * bytes_of(r.type);
  run_elements(kernels().activation->gated_bwd[r.type], r.a, r.N * r.a.D);
  return {dgate, dup};
}

BiasAct rows_with_activation(const char* op, const Tensor& x, int64_t activation, Type& t) {
  CHECK(x.dim() >= 1 && x.size(-1) > 0 && x.is_contiguous(), op, ": x must be contiguous [..., D], D >= 1");
  CHECK(activation >= kRelu && activation <= kSilu, op, ": there is no activation ", activation);
  t = type_of(x, op);
  BiasAct a{};
  a.D = x.size(-1);
  a.activation = int(activation);
  a.x = x.data_ptr();
  return a;
}

int gelu(bool tanh) { return tanh ? kGeluTanh : kGelu; }

}  // namespace

Tensor swiglu_fwd(Tensor gate, MaybeTensor up) { return gated_fwd("swiglu_fwd", gate, up, kSilu); }
std::tuple<Tensor, Tensor> swiglu_bwd(Tensor dy, Tensor gate, MaybeTensor up) {
  return gated_bwd("swiglu_bwd", dy, gate, up, kSilu);
}
Tensor geglu_fwd(Tensor gate, MaybeTensor up, bool tanh) { return gated_fwd("geglu_fwd", gate, up, gelu(tanh)); }
std::tuple<Tensor, Tensor> geglu_bwd(Tensor dy, Tensor gate, MaybeTensor up, bool tanh) {
  return gated_bwd("geglu_bwd", dy, gate, up, gelu(tanh));
}

Tensor bias_act_fwd(Tensor x, MaybeTensor bias, int64_t activation) {
  const char* op = "bias_act_fwd";
  Type t;
  BiasAct a = rows_with_activation(op, x, activation, t);
  check_weight(bias, a.D, op, "bias");
  const InComputeType b(bias, t, op);
  a.bias = b.data();
  const Tensor y = empty(shape_of(x), x.scalar_type());
  a.y = y.data_ptr();
  const int64_t elements = x.numel();
  if (!bias && elements) a.D = elements;
  run_elements(kernels().activation->bias_act_fwd[t], a, elements);
  return y;
}

std::tuple<Tensor, Tensor> bias_act_bwd(Tensor dy, Tensor x, MaybeTensor bias, int64_t activation, bool needs_dbias) {
  const char* op = "bias_act_bwd";
  Type t;
  BiasAct a = rows_with_activation(op, x, activation, t);
  check_like(dy, x, op, "dy");
  check_weight(bias, a.D, op, "bias");
  const InComputeType b(bias, t, op);
  a.bias = b.data();
  a.dy = dy.data_ptr();
  const Tensor dx = empty(shape_of(x), x.scalar_type());
  const ScalarType bias_type = bias ? bias->scalar_type() : x.scalar_type();
  const Tensor dbias = empty({needs_dbias ? a.D : 0}, bias_type);
  a.dx = dx.data_ptr();
  const Type compute = t == kDouble ? kDouble : kFloat;
  const int64_t N = x.numel() / a.D, stripes = stripes_of(N);
  std::unique_ptr<char[]> partial(new char[needs_dbias ? stripes * a.D * bytes_of(compute) + 1 : 1]);
  a.dbias = needs_dbias ? partial.get() : nullptr;
  const auto kernel = kernels().activation->bias_act_bwd[t];
  for_stripes(N, a.D, [&](int64_t stripe, int64_t begin, int64_t end) { kernel(a, stripe, begin, end); });
  if (needs_dbias) sum_stripes(a.dbias, compute, stripes, a.D, dbias, op);
  return {dx, dbias};
}

Tensor bias_gelu_fwd(Tensor x, MaybeTensor bias, bool tanh) { return bias_act_fwd(x, bias, gelu(tanh)); }
std::tuple<Tensor, Tensor> bias_gelu_bwd(Tensor dy, Tensor x, MaybeTensor bias, bool tanh) {
  return bias_act_bwd(dy, x, bias, gelu(tanh), bool(bias));
}

}  // namespace fastllm::cpu
