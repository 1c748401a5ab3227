// Tensors in, checks, threads, table call: one step of AdamW on many parameters.
#include "cpu/tensors.h"

namespace fastllm::cpu {
namespace {

constexpr const char* kOp = "adamw_step";
constexpr int64_t kPiece = 8192;  // elements that a thread takes at a time

void check_state(const Tensor& x, const Tensor& p, ScalarType type, const char* name) {
  CHECK(x.is_contiguous() && x.numel() == p.numel() && x.scalar_type() == type, kOp, ": ", name,
        " must be contiguous, with a number of the compute type for each of the parameter's");
}

}  // namespace

void adamw_step(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> max_exp_avg_sqs, std::vector<Tensor> steps,
                double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize) {
  const size_t n = params.size();
  CHECK(grads.size() == n && exp_avgs.size() == n && exp_avg_sqs.size() == n && steps.size() == n &&
            (max_exp_avg_sqs.empty() || max_exp_avg_sqs.size() == n),
        kOp, ": expected as many of each as parameters");
  std::vector<AdamW> parts(n);
  std::vector<Type> types(n);
  std::vector<int64_t> first{0};  // piece of each part
  for (size_t i = 0; i < n; ++i) {
    const Tensor& p = params[i];
    types[i] = type_of(p, kOp);
    const ScalarType state = compute_type(types[i]);
    CHECK(p.is_contiguous(), kOp, ": parameters must be contiguous");
    check_like(grads[i], p, kOp, "gradients");
    check_state(exp_avgs[i], p, state, "exp_avg");
    check_state(exp_avg_sqs[i], p, state, "exp_avg_sq");
    if (!max_exp_avg_sqs.empty()) check_state(max_exp_avg_sqs[i], p, state, "max_exp_avg_sq");
    CHECK(steps[i].numel() == 1, kOp, ": step must be a number");
    const Type step_type = type_of(steps[i], kOp);
    const double step = element(steps[i].data_ptr(), step_type, 0) + 1;
    set_element(steps[i].data_ptr(), step_type, 0, step);
    AdamW& a = parts[i];
    a.lr = lr, a.beta1 = beta1, a.beta2 = beta2, a.eps = eps, a.weight_decay = weight_decay, a.maximize = maximize;
    a.bias1 = 1 - std::pow(beta1, step), a.bias2 = 1 - std::pow(beta2, step);
    a.p = p.data_ptr(), a.grad = grads[i].data_ptr();
    a.m = exp_avgs[i].data_ptr(), a.v = exp_avg_sqs[i].data_ptr();
    a.v_max = max_exp_avg_sqs.empty() ? nullptr : max_exp_avg_sqs[i].data_ptr();
    a.n = p.numel();
    first.push_back(first.back() + (a.n + kPiece - 1) / kPiece);
  }
  const auto& kernel = kernels().adamw->step;
  for_range(first.back(), 2, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (; begin < end; ++i) {  // what of this range is the i-th part's
      const int64_t last = std::min(end, first[i + 1]);
      kernel[types[i]](parts[i], (begin - first[i]) * kPiece, std::min((last - first[i]) * kPiece, parts[i].n));
      begin = last;
    }
  });
}

}  // namespace fastllm::cpu
