#pragma once
#include <pybind11/pybind11.h>

namespace fastllm::cpu {

void bind_encoder(pybind11::module_& m);  // the class Encoder of fastllm._C

}  // namespace fastllm::cpu
