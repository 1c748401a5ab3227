// The plain calls of ops (<op>_plain: no options) as differentiable functions, with nodes of PyTorch's own autograd
// engine in the place of a torch.autograd.Function in Python, which takes longer than a small kernel does.
//
// Nodes are no part of the libtorch stable ABI. So this is a module apart (fastllm._autograd), imported beside the very
// torch it was compiled for; without it the Functions in fastllm/ops/ do the same.
//
// An op needs <op>_plain, <op>_fwd, <op>_bwd and <op>_again, and what is what follows from the names in their schemas:
// an argument of <op>_bwd is the plain call's argument or the result of <op>_fwd of that name; of the first result `y`
// the gradient is `dy`, of an argument `x` the result `dx`. `has_x` asks whether x was given, `needs_dx` whether dx is
// wanted. All else is an option that a plain call does not have: None, 0 or false. <op>_again, in Python, has the
// gradients that can be differentiated.
#include "autograd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace fastllm {
namespace {

using at::Tensor;
using c10::IValue;
using c10::OperatorHandle;
using torch::autograd::edge_list;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::jit::Stack;

// What holds a node: an intrusive_ptr, and in older PyTorch a shared_ptr.
using NodePtr = decltype(torch::autograd::Edge::function);

template <class Pointer>
constexpr bool kShared = std::is_constructible_v<Pointer, Node*, void (*)(Node*)>;

template <class Pointer, class T>
Pointer first_holder(T* node) {
  if constexpr (kShared<Pointer>)
    return Pointer(node, [](auto* n) { deleteNode(n); });
  else
    return Pointer::unsafe_steal_from_new(node);
}

template <class Pointer, class T>
Pointer another_holder(T* node) {
  if constexpr (kShared<Pointer>)
    return node->shared_from_this();
  else
    return Pointer::reclaim_copy(node);
}

// Where an argument of another op of the family comes from.
struct Source {
  enum Kind { kArgument, kResult, kGradient, kGiven, kWanted, kConstant } kind;
  size_t index = 0;
  IValue constant = {};
};
using Sources = std::vector<Source>;

template <class List>
int64_t find(const List& list, const std::string& name) {
  for (size_t i = 0; i < list.size(); ++i)
    if (list[i].name() == name) return int64_t(i);
  return -1;
}

}  // namespace

struct Family {
  std::string name;
  OperatorHandle plain, fwd, bwd, again;
  size_t tensors = 0;  // arguments of the plain call that are tensors: its first ones
  Sources for_fwd, for_bwd, for_again;
  std::vector<Source> kept;  // the tensors among these, each once
  std::vector<int64_t> bwd_result, again_result;

  explicit Family(const std::string& op)
      : name(op), plain(handle("_plain")), fwd(handle("_fwd")), bwd(handle("_bwd")), again(handle("_again")) {
    for (const auto& a : plain.schema().arguments()) tensors += is_tensor(a);
    for_fwd = sources(fwd), for_bwd = sources(bwd), for_again = sources(again);
    for (const Sources* all : {&for_bwd, &for_again})
      for (const Source& s : *all) keep(s);
    for (size_t i = 0; i < tensors; ++i) {
      const std::string gradient = "d" + plain.schema().arguments()[i].name();
      bwd_result.push_back(find(bwd.schema().returns(), gradient));
      again_result.push_back(find(again.schema().returns(), gradient));
    }
  }

  // A first gradient as the kernels take it: attention's read any strides.
  Tensor upstream(const Tensor& dy) const { return name == "attention" ? dy : dy.contiguous(); }

 private:
  OperatorHandle handle(const char* suffix) const {
    return c10::Dispatcher::singleton().findSchemaOrThrow(("fastllm::" + name + suffix).c_str(), "");
  }

  static bool is_tensor(const c10::Argument& a) {
    return a.type()->isSubtypeOf(*c10::OptionalType::create(c10::TensorType::get()));
  }

  Sources sources(const OperatorHandle& op) const {
    const auto& given = plain.schema().arguments();
    const auto& results = fwd.schema().returns();
    Sources all;
    for (const auto& a : op.schema().arguments()) {
      const std::string& n = a.name();
      const bool has = n.rfind("has_", 0) == 0, needs = n.rfind("needs_d", 0) == 0;
      // h: the norms' x after dropout and residual
      int64_t i = find(given, has ? n.substr(4) : needs ? n.substr(7) : n == "h" ? "x" : n);
      if (i >= 0) {
        all.push_back({has ? Source::kGiven : needs ? Source::kWanted : Source::kArgument, size_t(i)});
      } else if ((i = find(results, n)) >= 0) {
        all.push_back({Source::kResult, size_t(i)});
      } else if (n == "d" + results[0].name()) {
        all.push_back({Source::kGradient});
      } else {
        const auto kind = a.type()->kind();
        const IValue off = kind == c10::TypeKind::BoolType    ? IValue(false)
                           : kind == c10::TypeKind::FloatType ? IValue(0.0)
                                                              : IValue();
        TORCH_INTERNAL_ASSERT(!off.isNone() || kind == c10::TypeKind::OptionalType, op.schema(), ": what is ", n, "?");
        all.push_back({Source::kConstant, 0, off});
      }
    }
    return all;
  }

  void keep(const Source& s) {
    if (s.kind != Source::kResult && !(s.kind == Source::kArgument && s.index < tensors)) return;
    for (const Source& k : kept)
      if (k.kind == s.kind && k.index == s.index) return;
    kept.push_back(s);
  }
};

namespace {

Stack arranged(const Sources& sources, const Stack& arguments, const Stack& results, const Tensor& gradient,
               const std::vector<bool>& wanted) {
  Stack stack;
  stack.reserve(sources.size());
  for (const Source& s : sources) switch (s.kind) {
      case Source::kArgument:
        stack.push_back(arguments[s.index]);
        break;
      case Source::kResult:
        stack.push_back(results[s.index]);
        break;
      case Source::kGradient:
        stack.emplace_back(gradient);
        break;
      case Source::kGiven:
        stack.emplace_back(!arguments[s.index].isNone());
        break;
      case Source::kWanted:
        stack.emplace_back(bool(wanted[s.index]));
        break;
      case Source::kConstant:
        stack.push_back(s.constant);
    }
  return stack;
}

variable_list gradients(const Stack& found, const std::vector<int64_t>& places, const std::vector<bool>& wanted) {
  variable_list all(places.size());
  for (size_t i = 0; i < places.size(); ++i)
    if (wanted[i] && places[i] >= 0 && found[places[i]].isTensor()) all[i] = found[places[i]].toTensor();
  return all;
}

std::atomic<PyObject*> watcher{nullptr};

// The run of a node, told to `watch`'s function where there is one.
class Watched {
 public:
  Watched(const char* op, const Tensor& dy, bool again) : op_(op), dy_(dy), again_(again) {
    if (watcher) start_ = Clock::now();
  }
  void over() const {
    if (!start_ || !watcher) return;
    const std::chrono::duration<double> took = Clock::now() - *start_;
    const pybind11::gil_scoped_acquire gil;
    // Held, since what it runs may let another thread end the recording that it is of.
    const auto function = pybind11::reinterpret_borrow<pybind11::object>(watcher.load());
    if (!function) return;
    PyObject* const found = PyObject_CallFunction(function.ptr(), "sNdN", op_, THPVariable_Wrap(dy_), took.count(),
                                                  PyBool_FromLong(again_));
    if (!found) {
      python_error error;
      error.persist();
      throw error;
    }
    Py_DECREF(found);
  }

 private:
  using Clock = std::chrono::steady_clock;
  const char* const op_;
  const Tensor& dy_;
  const bool again_;
  std::optional<Clock::time_point> start_;
};

class Backward : public Node {
 public:
  Backward(const Family& family, edge_list edges, const char* called)
      : Node(std::move(edges)), family_(family), called_(called ? called : family.name.c_str()) {}

  // Once the result's history is this node: what is a result of its own must not hold it.
  void save(Stack arguments, const Stack& results) {
    saved_.reserve(family_.kept.size());
    for (const Source& k : family_.kept) {
      const bool result = k.kind == Source::kResult;
      const IValue& x = result ? results[k.index] : arguments[k.index];
      saved_.emplace_back(x.isTensor() ? x.toTensor() : Tensor(), result && k.index == 0);
    }
    for (size_t i = 0; i < family_.tensors; ++i) arguments[i] = IValue();
    arguments_ = std::move(arguments);
  }

  std::string name() const override { return "fastllm::" + family_.name + "_bwd"; }

  variable_list apply(variable_list&& dy) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!dy[0].defined()) return variable_list(num_outputs());
    const bool again = c10::GradMode::is_enabled();
    const std::vector<bool> wants = wanted();
    Stack stack = unpacked(again ? family_.for_again : family_.for_bwd, family_.upstream(dy[0]), wants);
    const Watched watched(called_, dy[0], again);
    if (again) {
      family_.again.callBoxed(stack);
    } else {
      const at::AutoDispatchBelowAutograd below;
      family_.bwd.callBoxed(stack);
    }
    watched.over();
    return gradients(stack, again ? family_.again_result : family_.bwd_result, wants);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& x : saved_) x.reset_data();
  }

  // Under torch._dynamo.compiled_autograd, which traces the engine's run with these two: one opaque call.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(name());
    args.collect(arguments_);
    for (size_t i = 0; i < saved_.size(); ++i) args.collect(saved_[i], is_output(i));
  }

  variable_list apply_with_saved(const variable_list& dy, torch::dynamo::autograd::SwapSavedVariables& saved) override {
    saved.before(arguments_);
    saved.before(saved_);
    const Stack stack = unpacked(family_.for_bwd, dy[0], wanted());
    std::vector<at::TypePtr> types;
    for (const IValue& x : stack) types.push_back(x.isTensor() ? at::TensorType::get() : x.type());
    const auto run = [&family = family_, wanted = wanted()](const variable_list& dy, const std::vector<IValue>& args) {
      Stack stack = args;
      for (size_t i = 0; i < stack.size(); ++i)
        if (family.for_bwd[i].kind == Source::kGradient) stack[i] = family.upstream(dy[0]);
      family.bwd.callBoxed(stack);
      return gradients(stack, family.bwd_result, wanted);
    };
    using namespace torch::dynamo::autograd;
    const auto& interface = getPyCompilerInterface();
    const auto metadata = IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
        get_input_metadata(next_edges()));
    const std::string bound = interface->bind_function(saved.get_py_compiler(), name(), run, types, true, false);
    variable_list found =
        interface->call_function(saved.get_py_compiler(), "apply_functional", bound, dy, stack, metadata);
    saved.after(arguments_);
    saved.after(saved_);
    return found;
  }

 private:
  bool is_output(size_t i) const { return family_.kept[i].kind == Source::kResult && family_.kept[i].index == 0; }

  std::vector<bool> wanted() const {
    std::vector<bool> all;
    all.reserve(num_outputs());
    for (size_t i = 0; i < num_outputs(); ++i) all.push_back(task_should_compute_output(i));
    return all;
  }

  Stack unpacked(const Sources& sources, const Tensor& dy, const std::vector<bool>& wanted) {
    Stack arguments = arguments_, results(family_.fwd.schema().returns().size());
    for (size_t i = 0; i < saved_.size(); ++i) {
      const Source& k = family_.kept[i];
      Tensor x = saved_[i].unpack(is_output(i) ? another_holder<NodePtr>(this) : nullptr);
      if (x.defined()) (k.kind == Source::kResult ? results : arguments)[k.index] = std::move(x);
    }
    return arranged(sources, arguments, results, dy, wanted);
  }

  const Family& family_;
  const char* const called_;
  Stack arguments_;  // those that are no tensors
  std::vector<SavedVariable> saved_;
};

// <op>_plain for tensors that autograd may look at.
class Plain : public c10::OperatorKernel {
 public:
  explicit Plain(std::string op) : op_(std::move(op)) {}

  void operator()(const OperatorHandle&, c10::DispatchKeySet, Stack* stack) {
    std::call_once(once_, [this] { family_ = &family(op_); });
    const auto first = stack->end() - ptrdiff_t(family_->plain.schema().arguments().size());
    Stack arguments(std::make_move_iterator(first), std::make_move_iterator(stack->end()));
    stack->erase(first, stack->end());
    stack->emplace_back(plain(*family_, std::move(arguments)));
  }

 private:
  const std::string op_;
  std::once_flag once_;
  const Family* family_ = nullptr;
};

TORCH_LIBRARY_IMPL(fastllm, AutogradCPU, m) {
  for (const char* op :
       {"attention", "bias_gelu", "cross_entropy", "geglu", "layer_norm", "linear", "rms_norm", "softmax", "swiglu"})
    m.impl((std::string(op) + "_plain").c_str(), torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Plain>(op)));
}

}  // namespace

const Family& family(const std::string& op) {
  static std::mutex mutex;
  static std::map<std::string, std::unique_ptr<Family>> families;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Family>& found = families[op];
  if (!found) found = std::make_unique<Family>(op);
  return *found;
}

Tensor plain(const Family& family, Stack&& arguments, const char* called) {
  bool differentiable = false;
  if (c10::GradMode::is_enabled() &&
      !c10::impl::tls_local_dispatch_key_set().excluded_.has(c10::DispatchKey::AutogradCPU))
    for (size_t i = 0; i < family.tensors; ++i)
      differentiable |= arguments[i].isTensor() && arguments[i].toTensor().requires_grad();
  if (!differentiable) {
    const at::AutoDispatchBelowAutograd below;
    family.plain.callBoxed(arguments);
    return std::move(arguments[0]).toTensor();
  }
  edge_list edges;
  edges.reserve(family.tensors);
  for (size_t i = 0; i < family.tensors; ++i)
    edges.push_back(arguments[i].isTensor() ? torch::autograd::impl::gradient_edge(arguments[i].toTensor())
                                            : torch::autograd::Edge());
  Stack results = arranged(family.for_fwd, arguments, {}, {}, {});
  {
    const at::AutoDispatchBelowAutograd below;
    family.fwd.callBoxed(results);
  }
  auto* const node = new Backward(family, std::move(edges), called);
  Tensor y = results[0].toTensor();
  torch::autograd::set_history(y, first_holder<NodePtr>(node));
  node->save(std::move(arguments), results);
  return y;
}

void watch(PyObject* function) {
  Py_INCREF(function);
  Py_XDECREF(watcher.exchange(function == Py_None ? nullptr : function));
  if (function == Py_None) Py_DECREF(function);
}

}  // namespace fastllm
