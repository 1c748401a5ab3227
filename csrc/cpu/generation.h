#pragma once
#include <pybind11/pybind11.h>

namespace fastllm::cpu {

void bind_generation(pybind11::module_& m);  // the class Decoder of fastllm._C

}  // namespace fastllm::cpu
