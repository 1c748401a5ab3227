// What the bindings share: the device and stream of a tensor, its type, and what is checked of it.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <dlfcn.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "cuda/kernels.h"

#ifndef FASTLLM_CUDA_DEVICE
#define FASTLLM_CUDA_DEVICE CUDA  // the emulator's kernels take CPU tensors
#endif

namespace fastllm::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The device of `x` is made current; the stream is the one that torch has current there.
class OnDeviceOf {
 public:
#ifdef FASTLLM_EMULATED
  explicit OnDeviceOf(const Tensor&) {}
#else
  explicit OnDeviceOf(const Tensor& x) : guard_(x.get_device_index()) {
    // Found at run time: a torch without CUDA does not have it, and a weak reference would miss it, as torch's
    // libraries are loaded locally. (The stable ABI's own way, Stream::nativeHandle, begins with torch 2.13.)
    using Find = int32_t (*)(int32_t device, void** stream);
    static const Find find =
        (Find)dlsym(dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD), "aoti_torch_get_current_cuda_stream");
    CHECK(find && find(x.get_device_index(), &stream_) == 0, "fastllm: torch does not tell its CUDA stream");
  }
#endif
  Stream stream() const { return stream_; }

 private:
  Stream stream_ = nullptr;
#ifndef FASTLLM_EMULATED
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline void check(Error error, const char* op) { CHECK(!error, op, ": ", error); }

inline Type type_of(const Tensor& x, const char* op) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return kFloat;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kHalf;
    default:
      CHECK(false, op, ": the CUDA C++ kernels take float32, bfloat16 and float16");
  }
  return kFloat;
}

inline std::vector<int64_t> shape_of(const Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes.data(), sizes.data() + sizes.size()};
}
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, type);
}
inline Tensor none_like(const Tensor& x) { return empty(x, {0}, x.scalar_type()); }
inline const void* data(const MaybeTensor& x) { return x ? x->data_ptr() : nullptr; }

inline MaybeTensor contiguous_vector(const MaybeTensor& w, int64_t D, const char* op, const char* name) {
  if (!w) return {};
  CHECK(w->numel() == D, op, ": ", name, " must have ", D, " elements, got ", w->numel());
  return torch::stable::contiguous(*w);
}
inline Vector vector(const MaybeTensor& w, const char* op) { return {data(w), w ? type_of(*w, op) : kFloat}; }

inline MaybeTensor at_most_float(const MaybeTensor& x) {
  return x && x->scalar_type() == ScalarType::Double ? MaybeTensor(torch::stable::to(*x, ScalarType::Float)) : x;
}

}  // namespace fastllm::cuda
