// Calls of ops from Python at once. Of a small call more time goes into checking it and finding its kernel than into
// the kernel, and what checks in Python costs is more than what PyTorch's own functions take.
//
// fastllm._autograd.<op>(...) runs the op where there is nothing to be asked: dense tensors on the CPU, no subclass of
// them, nothing transformed, traced or intercepted by a mode. It returns None everywhere else, and where the kernel
// refuses: the caller then goes the long way, which says what is wrong.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <optional>
#include <utility>

#include "autograd.h"
#include "products.h"

namespace fastllm {
namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using torch::jit::Stack;
using Result = std::optional<Tensor>;

constexpr int64_t kSmallLogits = 1 << 20;  // that linear_cross_entropy keeps for backward: 4 MiB in fp32

bool within(DispatchKeySet keys, DispatchKeySet others) { return !(keys.raw_repr() & ~others.raw_repr()); }

// Hooks on saved tensors go the long way in any case: torch.utils.checkpoint makes its forward pass a second time,
// maybe where that has to go there (under a mode, in a recording), and both passes have to save the same tensors.
bool is_free() {
  return within(c10::impl::tls_local_dispatch_key_set().included_, c10::default_included_set) &&
         !at::impl::torch_function_mode_enabled() && !torch::autograd::ForwardADLevel::try_get_by_idx(0) &&
         at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
}
bool is_autocast() { return !c10::impl::tls_local_dispatch_key_set().excluded_.has(DispatchKey::AutocastCPU); }
bool is_dense(const Tensor& x) {
  constexpr DispatchKeySet kDense(
      {DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::ADInplaceOrView, DispatchKey::AutocastCPU});
  return x.defined() && within(x.key_set(), kDense);
}

// What kernels take, and so what autocast may bring to its dtype: of other types it would drop what that cannot hold.
bool is_real(const Tensor& x) {
  const auto type = x.scalar_type();
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble;
}

// An argument as `kind` says: a tensor, ? one or None, a float, an int, a bool.
bool push(PyObject* x, char kind, Stack& stack) {
  switch (kind) {
    case '?':
      if (x == Py_None) return stack.emplace_back(), true;
      [[fallthrough]];
    case 't':
      if (!THPVariable_CheckExact(x) || !is_dense(THPVariable_Unpack(x))) return false;
      return stack.emplace_back(THPVariable_Unpack(x)), true;
    case 'f':
      if (PyFloat_Check(x)) return stack.emplace_back(PyFloat_AS_DOUBLE(x)), true;
      [[fallthrough]];
    case 'i': {
      if (!PyLong_CheckExact(x)) return false;
      int overflow = 0;
      const int64_t n = PyLong_AsLongLongAndOverflow(x, &overflow);
      if (overflow) return false;
      return kind == 'i' ? stack.emplace_back(n) : stack.emplace_back(double(n)), true;
    }
    default:
      return PyBool_Check(x) && (stack.emplace_back(x == Py_True), true);
  }
}

const Tensor& tensor(const Stack& a, size_t i) { return a[i].toTensor(); }
void make_contiguous(IValue& x) {
  if (!x.toTensor().is_contiguous()) x = x.toTensor().contiguous();
}

struct LayerNorm {
  static constexpr const char *kOp = "layer_norm", *kArguments = "t??f";
  static Result run(const Family& family, Stack& a) {
    make_contiguous(a[0]);
    return plain(family, std::move(a));
  }
};
struct RmsNorm : LayerNorm {
  static constexpr const char *kOp = "rms_norm", *kArguments = "t?ff";
};
struct BiasGelu : LayerNorm {
  static constexpr const char *kOp = "bias_gelu", *kArguments = "t?b";
};

struct Swiglu {
  static constexpr const char *kOp = "swiglu", *kArguments = "t?";
  static Result run(const Family& family, Stack& a) { return plain(family, std::move(a)); }
};
struct Geglu : Swiglu {
  static constexpr const char *kOp = "geglu", *kArguments = "t?b";
};

struct Softmax {  // x, scale, log
  static constexpr const char *kOp = "softmax", *kArguments = "tfb";
  static Result run(const Family& family, Stack& a) {
    make_contiguous(a[0]);
    return plain(family, {std::move(a[0]), IValue(), a[1], false, a[2]});
  }
};

struct Attention {  // q, k, v, causal
  static constexpr const char *kOp = "attention", *kArguments = "tttb";
  static Result run(const Family& family, Stack& a) {
    if (tensor(a, 0).dim() != 4 || tensor(a, 1).dim() != 4 || !tensor(a, 0).size(3)) return {};
    if (is_autocast()) {
      const auto low = at::autocast::get_autocast_dtype(at::kCPU);
      for (int i = 0; i < 3; ++i) {
        if (!is_real(tensor(a, i))) return {};
        if (tensor(a, i).scalar_type() != at::kDouble) a[i] = tensor(a, i).to(low);
      }
    }
    const double scale = std::pow(double(tensor(a, 0).size(3)), -0.5);
    const int64_t q_offset = tensor(a, 1).size(2) - tensor(a, 0).size(2), right = a[3].toBool() ? 0 : -1;
    return plain(family, {std::move(a[0]), std::move(a[1]), std::move(a[2]), scale, q_offset, int64_t(-1), right});
  }
};

struct CrossEntropy {  // input, target, ignore_index, reduction, label_smoothing
  static constexpr const char *kOp = "cross_entropy", *kArguments = "ttiif";
  static Result run(const Family& family, Stack& a, const char* called = nullptr) {
    const Tensor input = tensor(a, 0);
    const double smoothing = a[4].toDouble();
    if (input.dim() != 2 || tensor(a, 1).scalar_type() != at::kLong || !(smoothing >= 0 && smoothing <= 1)) return {};
    make_contiguous(a[0]), make_contiguous(a[1]);
    Tensor loss = plain(family, std::move(a), called);
    return is_autocast() ? loss : loss.to(input.scalar_type());
  }
};

// activation(x W^T + bias) where it is known whose products are the choice: PyTorch's in fp64; ours in those 16-bit
// types that `own` has a bit for; in fp32 what `chosen` says (fastllm/ops/_tuned.py).
Result product(const Tensor& x, const Tensor& weight, const IValue& bias, int64_t activation, int64_t own,
               const char* called = nullptr) {
  const bool autocast = is_autocast() && x.scalar_type() != at::kDouble;
  const auto dtype = autocast ? at::autocast::get_autocast_dtype(at::kCPU) : x.scalar_type();
  if (!x.dim() || weight.dim() != 2 || x.size(-1) != weight.size(1) || !is_real(x) || !is_real(weight)) return {};
  if (bias.isTensor() && (bias.toTensor().dim() != 1 || bias.toTensor().size(0) != weight.size(0))) return {};
  if (bias.isTensor() && !is_real(bias.toTensor())) return {};
  if (activation != kNoActivation && (!x.numel() || !weight.numel())) return {};
  if (own & (dtype == at::kBFloat16 ? 1 : dtype == at::kHalf ? 2 : 0)) {
    const auto given = [&](const Tensor& t) { return autocast && t.scalar_type() != at::kDouble ? t.to(dtype) : t; };
    const Tensor b = bias.isTensor() ? given(bias.toTensor()) : Tensor();
    return multiplied(given(x), given(weight), b, activation, kAllOurs, called);
  }
  if (is_autocast() || weight.scalar_type() != dtype || (dtype != at::kDouble && dtype != at::kFloat)) return {};
  if (bias.isTensor() && bias.toTensor().scalar_type() != dtype) return {};
  const int64_t K = weight.size(1);
  int whose = 0;
  if (dtype == at::kFloat && K) {
    const std::optional<int> found = chosen(x.numel() / K, weight.size(0), K);
    if (!found) return {};
    whose = *found;
  }
  return multiplied(x, weight, bias.isTensor() ? bias.toTensor() : Tensor(), activation, whose, called);
}

struct Linear {  // x, weight, bias, activation and own of `product`
  static constexpr const char *kOp = nullptr, *kArguments = "tt?ii";
  static Result run(const Stack& a) { return product(tensor(a, 0), tensor(a, 1), a[2], a[3].toInt(), a[4].toInt()); }
};

// input, linear_weight, target, linear_bias, ignore_index, reduction, label_smoothing and own of `product`. The
// few logits of a small call are kept.
struct LinearCrossEntropy {
  static constexpr const char *kOp = "cross_entropy", *kArguments = "ttt?iifi", *kCalled = "linear_cross_entropy";
  static Result run(const Family& family, Stack& a) {
    const Tensor &x = tensor(a, 0), &weight = tensor(a, 1), &target = tensor(a, 2);
    if (x.dim() != target.dim() + 1 || x.sizes().slice(0, target.dim()) != target.sizes() || !weight.numel()) return {};
    const bool flat = target.dim() == 1;
    if (target.numel() * weight.size(0) > kSmallLogits) return {};
    if (!flat && !a[5].toInt()) return {};  // a loss for each row, of the targets' shape
    const Tensor rows = flat ? x : x.reshape({target.numel(), x.size(-1)});
    const Result logits = product(rows, weight, a[3], kNoActivation, a[7].toInt(), kCalled);
    if (!logits) return {};
    Stack given{*logits, flat ? target : target.reshape(-1), a[4], a[5], a[6]};
    return CrossEntropy::run(family, given, kCalled);
  }
};

template <class Op>
Result run(Stack& arguments) {
  if constexpr (Op::kOp == nullptr) {
    return Op::run(arguments);
  } else {
    static const Family& of = family(Op::kOp);
    return Op::run(of, arguments);
  }
}

template <class Op>
PyObject* call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Stack arguments;
  arguments.reserve(9);
  if (!is_free()) Py_RETURN_NONE;
  const char* kind = Op::kArguments;
  for (Py_ssize_t i = 0; i < count; ++i, ++kind)
    if (!*kind || !push(given[i], *kind, arguments)) Py_RETURN_NONE;
  if (*kind) Py_RETURN_NONE;
  Result found;
  try {
    torch::PyWarningHandler warnings;  // PyTorch's become Python's, as in its own functions
    try {
      const pybind11::gil_scoped_release without_gil;
      found = run<Op>(arguments);
    } catch (...) {
      warnings.set_in_exception();
      throw;
    }
  } catch (python_error& error) {  // of a warning that the caller makes an error
    error.restore();
    return nullptr;
  } catch (const std::exception&) {  // the long way says it
  }
  if (!found) Py_RETURN_NONE;
  return THPVariable_Wrap(std::move(*found));
}

PyObject* watch_from_python(PyObject*, PyObject* function) {
  watch(function);
  Py_RETURN_NONE;
}

PyObject* choose_from_python(PyObject*, PyObject* function) {
  choose(function);
  Py_RETURN_NONE;
}

template <class Op>
PyMethodDef method(const char* name) {
  return {name, (PyCFunction)(void (*)())&call<Op>, METH_FASTCALL, nullptr};
}
PyMethodDef methods[] = {method<Attention>("attention"),
                         method<BiasGelu>("bias_gelu"),
                         {"choose", choose_from_python, METH_O, "Ask (M, N, K) for whose products are faster in fp32."},
                         method<CrossEntropy>("cross_entropy"),
                         method<Geglu>("geglu"),
                         method<LayerNorm>("layer_norm"),
                         method<Linear>("linear"),
                         method<LinearCrossEntropy>("linear_cross_entropy"),
                         method<RmsNorm>("rms_norm"),
                         method<Softmax>("softmax"),
                         method<Swiglu>("swiglu"),
                         {"watch", watch_from_python, METH_O, "Call (op, dy, seconds, again) after each node."},
                         {}};
PyModuleDef module{PyModuleDef_HEAD_INIT, "fastllm._autograd", "Plain calls of ops, at once.", -1, methods};

}  // namespace
}  // namespace fastllm

PyMODINIT_FUNC PyInit__autograd() { return PyModule_Create(&fastllm::module); }
