// Tensors in, checks, threads, table call: cross_entropy, and the rows of linear_cross_entropy.
#include <string>

#include "cpu/tensors.h"

namespace fastllm::cpu {
namespace {

enum Reduction { kNone, kMean, kSum };  // as in fastllm/ops/cross_entropy.py

double class_weight(const void* weight, Type t, int64_t c) {
  return !weight ? 1.0 : t == kDouble ? ((const double*)weight)[c] : ((const float*)weight)[c];
}

struct Total {  // of the rows that are not ignored: the sum of their weights, their number
  double weights = 0, rows = 0;
};
Total total_of(const char* op, const Tensor& target, const void* weight, Type t, int64_t V, int64_t ignore_index) {
  CHECK(target.dim() == 1 && target.scalar_type() == ScalarType::Long && target.is_contiguous(), op,
        ": target must be contiguous int64 [N]");
  const int64_t N = target.numel(), *classes = (const int64_t*)target.data_ptr();
  Total total;
  for (int64_t i = 0; i < N; ++i) {
    const int64_t c = classes[i];
    if (c == ignore_index) continue;
    CHECK(c >= 0 && c < V, op, ": target ", c, " of row ", i, " is not one of the ", V,
          " classes, nor ignore_index=", ignore_index);
    if (weight) total.weights += class_weight(weight, t, c);
    total.rows += 1;
  }
  if (!weight) total.weights = total.rows;
  return total;
}

constexpr int64_t kTogether = 2048;  // elements of rows that are taken forward and backward together
constexpr int64_t kOfRow = 16;       // elements: what a row takes beside its own, for its logarithm and its target

// One call: the kernel's arguments, the class weights in the compute type, and what the mean divides by.
struct Loss {
  const char* op;
  Type t;
  int64_t N, V;
  InComputeType weight;
  CrossEntropy kernel{};
  Total total;
  bool mean;

  Loss(const char* op, const Tensor& x, const Tensor& target, const MaybeTensor& weight, int64_t ignore_index,
       bool mean, double label_smoothing, double softcap, double z_loss, const double* of_all_rows = nullptr)
      : op(op), t(type_of(x, op)), N(target.numel()), V(x.dim() ? x.size(-1) : 0), weight(weight, t, op), mean(mean) {
    CHECK(x.dim() == 2 && x.is_contiguous() && V > 0 && x.size(0) == N, op,
          ": x must be contiguous [N, V] with V >= 1 and a target for each row");
    CHECK(!weight || weight->numel() == V, op, ": weight must have ", V, " elements");
    total = total_of(op, target, this->weight.data(), t, V, ignore_index);
    if (of_all_rows) total = {of_all_rows[0], of_all_rows[1]};
    kernel.V = V;
    kernel.ignore_index = ignore_index;
    kernel.label_smoothing = label_smoothing;
    kernel.softcap = softcap;
    // The mean divides cross-entropies by the sum of weights, but the z-loss, which has no class, by the rows.
    kernel.z_loss = mean && total.rows > 0 ? z_loss * total.weights / total.rows : z_loss;
    kernel.x = x.data_ptr();
    kernel.target = (const int64_t*)target.data_ptr();
    kernel.weight = this->weight.data();
    kernel.weight_sum = double(V);
    if (kernel.weight && label_smoothing) {
      kernel.weight_sum = 0;
      for (int64_t c = 0; c < V; ++c) kernel.weight_sum += class_weight(kernel.weight, t, c);
    }
  }

  // The gradient of every row's loss: an element of dloss for each row, or one for all.
  std::vector<double> gradients(const Tensor& dloss) const {
    const int64_t n = dloss.numel();
    CHECK(dloss.is_contiguous() && (n == N || n == 1), op, ": dloss must be contiguous [N] or []");
    const Type from = type_of(dloss, op);
    const double divisor = mean ? total.weights : 1.0;
    if (n == 1) return std::vector<double>(N, element(dloss.data_ptr(), from, 0) / divisor);
    std::vector<double> rows(N);
    for (int64_t i = 0; i < N; ++i) rows[i] = element(dloss.data_ptr(), from, i) / divisor;
    return rows;
  }

  template <class F>
  void for_rows(F f) const {
    for_range(N, kGrain / (V + kOfRow) + 1, f);
  }
};

const double* data_of(const MaybeTensor& total, const char* op) {
  CHECK(!total || (total->numel() == 2 && total->scalar_type() == ScalarType::Double), op,
        ": total must be float64 [2]");
  return total ? (const double*)total->data_ptr() : nullptr;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy_fwd(Tensor x, Tensor target, MaybeTensor weight, int64_t ignore_index,
                                                     int64_t reduction, double label_smoothing, double softcap,
                                                     double z_loss, bool accuracy) {
  Loss loss("cross_entropy_fwd", x, target, weight, ignore_index, reduction == kMean, label_smoothing, softcap, z_loss);
  const Tensor lse = empty({loss.N}, ScalarType::Double);
  const Tensor right = empty({accuracy ? loss.N : 0}, ScalarType::Bool);
  std::vector<double> rows(loss.N);
  CrossEntropy& a = loss.kernel;
  a.loss = rows.data();
  a.lse = (double*)lse.data_ptr();
  a.right = accuracy ? (uint8_t*)right.data_ptr() : nullptr;
  const auto kernel = kernels().cross_entropy->fwd[loss.t];
  loss.for_rows([&](int64_t begin, int64_t end) { kernel(a, begin, end); });

  // Added in order, so that threads do not change the sum.
  if (reduction != kNone) {
    double sum = 0;
    for (double row : rows) sum += row;
    rows = {reduction == kMean ? sum / loss.total.weights : sum};
  }
  const Type compute = loss.t == kDouble ? kDouble : kFloat;
  const Tensor out =
      empty(reduction == kNone ? std::vector<int64_t>{loss.N} : std::vector<int64_t>{}, compute_type(loss.t));
  for (size_t i = 0; i < rows.size(); ++i) set_element(out.data_ptr(), compute, int64_t(i), rows[i]);
  return {out, lse, right};
}

Tensor cross_entropy_plain(Tensor x, Tensor target, int64_t ignore_index, int64_t reduction, double label_smoothing) {
  return std::get<0>(cross_entropy_fwd(x, target, {}, ignore_index, reduction, label_smoothing, 0, 0, false));
}

Tensor cross_entropy_bwd(Tensor dloss, Tensor x, Tensor target, MaybeTensor weight, Tensor lse, int64_t ignore_index,
                         int64_t reduction, double label_smoothing, double softcap, double z_loss) {
  Loss loss("cross_entropy_bwd", x, target, weight, ignore_index, reduction == kMean, label_smoothing, softcap, z_loss);
  CHECK(lse.numel() == loss.N && lse.scalar_type() == ScalarType::Double, loss.op, ": lse must be float64 [N]");
  const std::vector<double> rows = loss.gradients(dloss);
  const Tensor dx = empty(shape_of(x), x.scalar_type());
  CrossEntropy& a = loss.kernel;
  a.lse = (double*)lse.data_ptr();
  a.dloss = rows.data();
  a.dx = dx.data_ptr();
  const auto kernel = kernels().cross_entropy->bwd[loss.t];
  loss.for_rows([&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return dx;
}

Tensor cross_entropy_total(Tensor target, MaybeTensor weight, int64_t classes, int64_t ignore_index) {
  const char* op = "cross_entropy_total";
  const InComputeType in_double(weight, kDouble, op);
  const Total total = total_of(op, target, in_double.data(), kDouble, classes, ignore_index);
  const Tensor out = empty({2}, ScalarType::Double);
  ((double*)out.data_ptr())[0] = total.weights;
  ((double*)out.data_ptr())[1] = total.rows;
  return out;
}

std::tuple<Tensor, Tensor> cross_entropy_rows(Tensor x, Tensor target, MaybeTensor weight, MaybeTensor total,
                                              MaybeTensor dloss, int64_t ignore_index, double label_smoothing,
                                              double softcap, double z_loss, bool accuracy) {
  const char* op = "cross_entropy_rows";
  Loss loss(op, x, target, weight, ignore_index, bool(total), label_smoothing, softcap, z_loss, data_of(total, op));
  const Tensor rows = empty({loss.N}, ScalarType::Double);
  const Tensor right = empty({accuracy ? loss.N : 0}, ScalarType::Bool);
  std::vector<double> lse(loss.N), gradients;
  CrossEntropy& a = loss.kernel;
  a.loss = (double*)rows.data_ptr();
  a.lse = lse.data();
  a.right = accuracy ? (uint8_t*)right.data_ptr() : nullptr;
  if (dloss) {
    gradients = loss.gradients(*dloss);
    a.dloss = gradients.data();
    a.dx = x.data_ptr();
  }
  const CrossEntropyKernels& table = *kernels().cross_entropy;
  const int64_t step = kTogether / loss.V + 1;
  loss.for_rows([&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += step) {  // both passes while the rows are in the cache
      const int64_t next = std::min(end, row + step);
      table.fwd[loss.t](a, row, next);
      if (a.dloss) table.bwd[loss.t](a, row, next);
    }
  });
  return {rows, right};
}

}  // namespace fastllm::cpu
