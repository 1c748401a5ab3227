// Every C++ op, one list. The schemas are defined in Python (fastllm/ops/), so that they exist without this library
// too.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "cpu/bindings.h"
#include "cpu/dispatch.h"
#include "cpu/encoder.h"
#include "cpu/generation.h"

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&fastllm::cpu::layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&fastllm::cpu::layer_norm_bwd));
  m.impl("rms_norm_fwd", TORCH_BOX(&fastllm::cpu::rms_norm_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&fastllm::cpu::rms_norm_bwd));
  m.impl("layer_norm_plain", TORCH_BOX(&fastllm::cpu::layer_norm_plain));
  m.impl("rms_norm_plain", TORCH_BOX(&fastllm::cpu::rms_norm_plain));
  m.impl("softmax_fwd", TORCH_BOX(&fastllm::cpu::softmax_fwd));
  m.impl("softmax_plain", TORCH_BOX(&fastllm::cpu::softmax_fwd));
  m.impl("softmax_bwd", TORCH_BOX(&fastllm::cpu::softmax_bwd));
  m.impl("linear_fwd", TORCH_BOX(&fastllm::cpu::linear_fwd));
  m.impl("linear_plain", TORCH_BOX(&fastllm::cpu::linear_fwd));
  m.impl("linear_out", TORCH_BOX(&fastllm::cpu::linear_out));
  m.impl("linear_act_fwd", TORCH_BOX(&fastllm::cpu::linear_act_fwd));
  m.impl("linear_bwd_out", TORCH_BOX(&fastllm::cpu::linear_bwd_out));
  m.impl("linear_bwd", TORCH_BOX(&fastllm::cpu::linear_bwd));
  m.impl("cross_entropy_fwd", TORCH_BOX(&fastllm::cpu::cross_entropy_fwd));
  m.impl("cross_entropy_plain", TORCH_BOX(&fastllm::cpu::cross_entropy_plain));
  m.impl("cross_entropy_bwd", TORCH_BOX(&fastllm::cpu::cross_entropy_bwd));
  m.impl("cross_entropy_total", TORCH_BOX(&fastllm::cpu::cross_entropy_total));
  m.impl("cross_entropy_rows", TORCH_BOX(&fastllm::cpu::cross_entropy_rows));
  m.impl("swiglu_fwd", TORCH_BOX(&fastllm::cpu::swiglu_fwd));
  m.impl("swiglu_plain", TORCH_BOX(&fastllm::cpu::swiglu_fwd));
  m.impl("swiglu_bwd", TORCH_BOX(&fastllm::cpu::swiglu_bwd));
  m.impl("geglu_fwd", TORCH_BOX(&fastllm::cpu::geglu_fwd));
  m.impl("geglu_plain", TORCH_BOX(&fastllm::cpu::geglu_fwd));
  m.impl("geglu_bwd", TORCH_BOX(&fastllm::cpu::geglu_bwd));
  m.impl("bias_act_fwd", TORCH_BOX(&fastllm::cpu::bias_act_fwd));
  m.impl("bias_act_bwd", TORCH_BOX(&fastllm::cpu::bias_act_bwd));
  m.impl("bias_gelu_fwd", TORCH_BOX(&fastllm::cpu::bias_gelu_fwd));
  m.impl("bias_gelu_plain", TORCH_BOX(&fastllm::cpu::bias_gelu_fwd));
  m.impl("bias_gelu_bwd", TORCH_BOX(&fastllm::cpu::bias_gelu_bwd));
  m.impl("adamw_step", TORCH_BOX(&fastllm::cpu::adamw_step));
  m.impl("rope_fwd", TORCH_BOX(&fastllm::cpu::rope_fwd));
  m.impl("attention_fwd", TORCH_BOX(&fastllm::cpu::attention_fwd));
  m.impl("attention_plain", TORCH_BOX(&fastllm::cpu::attention_plain));
  m.impl("attention_bwd", TORCH_BOX(&fastllm::cpu::attention_bwd));
  m.impl("attention_varlen_fwd", TORCH_BOX(&fastllm::cpu::attention_varlen_fwd));
  m.impl("attention_varlen_bwd", TORCH_BOX(&fastllm::cpu::attention_varlen_bwd));
  m.impl("weight_only_linear_fwd", TORCH_BOX(&fastllm::cpu::weight_only_linear_fwd));
  m.impl("quantized_linear_fwd", TORCH_BOX(&fastllm::cpu::quantized_linear_fwd));
  m.impl("quantized_linear_bwd", TORCH_BOX(&fastllm::cpu::quantized_linear_bwd));
  m.impl("dequantize_fwd", TORCH_BOX(&fastllm::cpu::dequantize_fwd));
  m.impl("attention_kvcache_fwd", TORCH_BOX(&fastllm::cpu::attention_kvcache_fwd));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ kernels of fastllm, reached as torch.ops.fastllm.*; here is which instruction set they use.";
  m.def("available", &fastllm::available, "Instruction sets that this build has and this CPU runs, narrowest first.");
  m.def("select", &fastllm::select, "Use one of available(); '' for the widest. Raises ValueError for another name.");
  m.def("selected", &fastllm::selected, "The instruction set in use.");
  m.def("poison", [](bool on) { fastllm::cpu::poison_fresh_memory = on; }, "Fill fresh memory with NaN; for tests.");
  m.def(
      "multiply_adds", &fastllm::cpu::multiply_adds, pybind11::arg("rounds"), pybind11::arg("bf16") = false,
      "Multiply-adds in registers, on all threads at once, in fp32 or of bf16; returns how many operations they were.");
  fastllm::cpu::bind_generation(m);
  fastllm::cpu::bind_encoder(m);
}
