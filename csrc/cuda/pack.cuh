// Numbers from memory: in packs of 16 bytes, and of types that are known at run time.
#pragma once
#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace fastllm::cuda {
namespace {

// V neighbouring numbers, moved in one instruction.
template <class T, int V>
struct alignas(V * sizeof(T)) Pack {
  T x[V];
};
template <class T>
constexpr int kWide = 16 / sizeof(T);  // numbers in 16 bytes

template <int V, class T>
DEVICE Pack<T, V> load(const T* p) {
  return *(const Pack<T, V>*)p;
}
template <class T, int V>
DEVICE void store(const Pack<T, V>& pack, T* p) {
  *(Pack<T, V>*)p = pack;
}

template <class T, int V>
DEVICE void load_floats(float (&out)[V], const void* data, int64_t i) {
  constexpr int kPart = V < kWide<T> ? V : kWide<T>;
#pragma unroll
  for (int j = 0; j < V; j += kPart) {
    const Pack<T, kPart> pack = load<kPart>((const T*)data + i + j);
#pragma unroll
    for (int n = 0; n < kPart; ++n) out[j + n] = widen(pack.x[n]);
  }
}
// Numbers i, i + 1, ... of a weight of any type, in fp32.
template <int V>
DEVICE void load_vector(float (&out)[V], Vector w, int64_t i) {
  switch (w.type) {
    case kFloat:
      return load_floats<float>(out, w.data, i);
    case kBFloat16:
      return load_floats<bf16>(out, w.data, i);
    default:
      return load_floats<half>(out, w.data, i);
  }
}

// Number i of a weight of any type.
DEVICE float number(Vector w, int64_t i) {
  float one[1];
  load_vector(one, w, i);
  return one[0];
}

inline bool aligned(const void* p) { return (uintptr_t)p % 16 == 0; }  // null is

}  // namespace
}  // namespace fastllm::cuda
