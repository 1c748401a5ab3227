#include "products.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/threshold_backward.h>
#include <c10/core/GradMode.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "autograd.h"

namespace fastllm {
namespace {

using at::Tensor;
using c10::IValue;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

enum { kRelu, kGelu, kGeluTanh, kSilu };  // as in csrc/cpu/table.h

using Size = std::array<int64_t, 4>;  // M, N, K, threads
struct HashOfSize {
  size_t operator()(const Size& size) const {
    uint64_t hash = 0;
    for (int64_t n : size) hash = (hash ^ uint64_t(n)) * 0x9e3779b97f4a7c15u, hash ^= hash >> 32;
    return size_t(hash);
  }
};
constexpr size_t kRemembered = 4096;
constexpr int64_t kWorthMixing =
    1 << 22;  // multiplications: a node that mixes products takes 10 us more than PyTorch's

std::mutex mutex;
std::unordered_map<Size, int, HashOfSize> remembered;
PyObject* asked = nullptr;

std::optional<int> ask(int64_t M, int64_t N, int64_t K) {
  const pybind11::gil_scoped_acquire gil;
  if (!asked) return {};
  const auto function = pybind11::reinterpret_borrow<pybind11::object>(asked);
  PyObject* const found = PyObject_CallFunction(function.ptr(), "LLL", (long long)M, (long long)N, (long long)K);
  const long bits = found ? PyLong_AsLong(found) : -1;
  Py_XDECREF(found);
  if (PyErr_Occurred()) {
    if (PyErr_ExceptionMatches(PyExc_Exception)) return PyErr_Clear(), std::nullopt;  // the long way asks again
    python_error interrupt;
    interrupt.persist();
    throw interrupt;
  }
  return int(bits);
}

template <class... Arguments>
Stack result_of(const char* op, Arguments&&... arguments) {
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(op, "");
  Stack stack{IValue(std::forward<Arguments>(arguments))...};
  const at::AutoDispatchBelowAutograd below;
  handle.callBoxed(stack);
  return stack;
}
IValue maybe(const Tensor& x) { return x.defined() ? IValue(x) : IValue(); }
std::optional<Tensor> optional(const Tensor& x) { return x.defined() ? std::optional<Tensor>(x) : std::nullopt; }

Tensor flat(const Tensor& x) { return x.dim() == 2 ? x : x.reshape({-1, x.size(-1)}); }

// PyTorch's x W^T + bias, of a contiguous x; no view, which a Function's caller could not modify in place.
Tensor pytorchs(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  if (x.dim() == 2) return at::linear(x, weight, optional(bias));
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  return at::_unsafe_view(at::linear(flat(x), weight, optional(bias)), shape);
}

struct Forward {
  Tensor y, kept;  // what backward needs of the activation: x W^T + bias, or for relu, of which the sign is enough, y
};
Forward forward(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t activation, int whose, bool keep) {
  const bool ours = whose & kOurForward;
  if (activation == kNoActivation) {
    if (ours) return {result_of("fastllm::linear_fwd", x, weight, maybe(bias))[0].toTensor(), {}};
    return {pytorchs(x, weight, bias), {}};
  }
  const bool sign = activation == kRelu;
  Tensor y, z;
  if (ours) {
    const Stack found = result_of("fastllm::linear_act_fwd", x, weight, maybe(bias), activation, keep && !sign);
    y = found[0].toTensor(), z = found[1].toTensor();
  } else {
    z = pytorchs(x, weight, bias);
    y = result_of("fastllm::bias_act_fwd", z, IValue(), activation)[0].toTensor();
  }
  return {y, sign ? y : z};
}

// dy as it comes through the activation of z, by PyTorch, which can differentiate it.
Tensor through(const Tensor& dy, const Tensor& z, int64_t activation) {
  switch (activation) {
    case kRelu:
      return at::threshold_backward(dy, z, 0);
    case kSilu: {  // silu_backward has no derivative
      const Tensor s = at::sigmoid(z);
      return dy * s * (1 + z * (1 - s));
    }
    case kGelu:
      return at::gelu_backward(dy, z, "none");
    case kGeluTanh:
      return at::gelu_backward(dy, z, "tanh");
    default:
      return dy;
  }
}

class Mixed : public torch::autograd::Function<Mixed> {
 public:
  // `given` may not be an undefined tensor: a Function takes the size of every tensor it is given.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& given,
                        int64_t activation, int64_t whose) {
    const at::AutoDispatchBelowAutograd below;
    const Tensor bias = given.value_or(Tensor());
    const Forward found = fastllm::forward(x, weight, bias, activation, int(whose), true);
    ctx->save_for_backward({x, weight, bias, found.kept});
    ctx->saved_data["activation"] = activation;
    ctx->saved_data["whose"] = whose;
    return found.y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &bias = saved[2];
    const int64_t activation = ctx->saved_data["activation"].toInt(), whose = ctx->saved_data["whose"].toInt();
    const bool needs_dx = ctx->needs_input_grad(0), needs_dweight = ctx->needs_input_grad(1);
    const bool needs_dbias = bias.defined() && ctx->needs_input_grad(2);
    Tensor dy = gradients[0], dx, dweight, dbias;
    if (!dy.defined()) return variable_list(5);
    if (c10::GradMode::is_enabled()) {
      if (activation != kNoActivation) dy = through(dy, at::linear(x, weight, optional(bias)), activation);
      if (needs_dx) dx = at::matmul(dy, weight);
      if (needs_dweight) dweight = at::matmul(flat(dy).t(), flat(x));
      if (needs_dbias) dbias = flat(dy).sum(0);
      return {dx, dweight, dbias, Tensor(), Tensor()};
    }
    dy = dy.contiguous();
    bool sum = needs_dbias;
    if (activation != kNoActivation) {
      const Stack found = result_of("fastllm::bias_act_bwd", dy, saved[3], IValue(), activation, needs_dbias);
      dy = found[0].toTensor();
      if (needs_dbias) dbias = found[1].toTensor();
      sum = false;
    }
    const bool our_dx = needs_dx && (whose & kOurDx), our_dweight = needs_dweight && (whose & kOurDweight);
    if (our_dx || our_dweight || sum) {
      const Stack found = result_of("fastllm::linear_bwd", dy, x, weight, our_dx, our_dweight, sum);
      if (our_dx) dx = found[0].toTensor();
      if (our_dweight) dweight = found[1].toTensor();
      if (sum) dbias = found[2].toTensor();
    }
    if (needs_dx && !our_dx) dx = at::matmul(dy, weight);
    if (needs_dweight && !our_dweight) dweight = at::matmul(flat(dy).t(), flat(x));
    return {dx, dweight, dbias, Tensor(), Tensor()};
  }
};

bool wants_gradient(const Tensor& x) { return x.defined() && x.requires_grad(); }

}  // namespace

std::optional<int> chosen(int64_t M, int64_t N, int64_t K) {
  const Size size{M, N, K, at::get_num_threads()};
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = remembered.find(size);
    if (found != remembered.end()) return found->second;
  }
  const std::optional<int> found = ask(M, N, K);
  if (!found) return {};
  const std::lock_guard<std::mutex> lock(mutex);
  if (remembered.size() >= kRemembered) remembered.clear();
  remembered[size] = *found;
  return found;
}

void choose(PyObject* function) {
  Py_INCREF(function);
  Py_XDECREF(std::exchange(asked, function == Py_None ? nullptr : function));
  if (function == Py_None) Py_DECREF(function);
  const std::lock_guard<std::mutex> lock(mutex);
  remembered.clear();
}

Tensor multiplied(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t activation, int whose,
                  const char* called) {
  const bool plainly = activation == kNoActivation;
  const bool differentiable =
      c10::GradMode::is_enabled() && (wants_gradient(x) || wants_gradient(weight) || wants_gradient(bias));
  if (differentiable && whose != kAllOurs && x.numel() * weight.size(0) < kWorthMixing) whose = 0;
  if (!whose) {
    const Tensor z = at::linear(x, weight, optional(bias));
    if (activation == kRelu) return at::relu(z);
    if (activation == kSilu) return at::silu(z);
    static const Family& gelu = family("bias_gelu");
    return plainly ? z : plain(gelu, {z, IValue(), activation == kGeluTanh}, called);
  }
  const Tensor given = x.contiguous(), b = bias.defined() ? bias.contiguous() : bias;
  const Tensor w = weight.stride(0) == 1 || weight.stride(1) == 1 ? weight : weight.contiguous();
  if (plainly && whose == kAllOurs) {
    static const Family& linear = family("linear");
    return plain(linear, {given, w, maybe(b)}, called);
  }
  if (differentiable) return Mixed::apply(given, w, optional(b), activation, int64_t(whose));
  const at::AutoDispatchBelowAutograd below;
  return forward(given, w, b, activation, whose, false).y;
}

}  // namespace fastllm
