// The plain calls of ops as differentiable functions: what csrc/direct.cpp calls of csrc/autograd.cpp.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>
#include <Python.h>

#include <string>

namespace fastllm {

struct Family;

// The ops of one name, which have to be defined by now; looked up once.
const Family& family(const std::string& op);

// <op>_plain of these arguments, with a node where autograd wants one; `called` is the op that the user called, where
// that is another.
at::Tensor plain(const Family& family, torch::jit::Stack&& arguments, const char* called = nullptr);

// Called with the GIL after each run of a node of ours: (op, first gradient, seconds, whether PyTorch made gradients
// that can be differentiated). None, as at first: nothing is.
void watch(PyObject* function);

}  // namespace fastllm
