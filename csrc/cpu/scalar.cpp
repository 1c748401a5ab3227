// The portable kernels: whatever the compiler's baseline is (SSE2 on x86-64).
#include "cpu/isa.h"

namespace fastllm {
namespace {
#include "float16.inl"
#include "vec_array.inl"
using Vec = ArrayVec<float, 4>;
using VecD = ArrayVec<double, 4>;
#include "math.inl"
#include "words.inl"

struct Tiles {  // 16 registers: 6 x 2 sums, 2 right words, 1 left word
  static constexpr int kColumns = 2;
  static constexpr int rows(int columns) { return columns == 2 ? 6 : 8; }
};
using BFloat16Word = float;
#include "kernels.inl"
}  // namespace

extern const Kernels k_scalar = KERNEL_TABLE("scalar");
}  // namespace fastllm
