// The portable kernels: whatever the compiler's baseline is (SSE2 on x86-64).
#include "cpu/isa.h"

namespace fastllm {
namespace {
#include "float16.inl"
#include "vec_array.inl"
using Vec = ArrayVec<float, 8>;
using VecD = ArrayVec<double, 4>;
#include "math.inl"
template <class S>
using Wide = Vec;  // of long chains of instructions
#include "words.inl"

struct Tiles {  // a Vec is two SSE registers: 12 of 16 are sums
  static constexpr int kColumns = 1;
  static constexpr int rows(int columns) { return columns * 6; }
  static constexpr int64_t height(int64_t rest, int columns) {
    return rest >= rows(columns) ? rows(columns) : rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
  }
  static constexpr int below(int height) { return height > 4 ? 4 : height / 2; }
};
using BFloat16Word = float;
#include "kernels.inl"
}  // namespace

EXPORT_TABLE(scalar)
}  // namespace fastllm
