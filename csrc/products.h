// Products of linear, forward and backward, each by the kernel that is the choice for its size: ours or PyTorch's.
#pragma once
#include <ATen/core/Tensor.h>
#include <Python.h>

#include <optional>

namespace fastllm {

constexpr int64_t kNoActivation = -1;  // else as in csrc/cpu/table.h
constexpr int kOurForward = 1, kOurDx = 2, kOurDweight = 4, kAllOurs = 7;

// Whose the products of y [M, N] = x [M, K] W^T are in fp32, as bits of the above. What `choose` was given is asked
// once for each size and number of threads; nothing where it was given nothing, or fails.
std::optional<int> chosen(int64_t M, int64_t N, int64_t K);
void choose(PyObject* function);  // (M, N, K) -> bits; forgets what was chosen. None: nothing is.

// activation(x W^T + bias) of a dtype, `whose` the products are, with a node where autograd wants one.
at::Tensor multiplied(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, int64_t activation,
                      int whose, const char* called);

}  // namespace fastllm
