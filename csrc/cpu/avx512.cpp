// AVX-512 (F, BW, VL, DQ).
#include "cpu/isa.h"

namespace fastllm {
namespace {
#include "float16.inl"
#include "vec_array.inl"
#include "vec_avx512.inl"
using VecD = ArrayVec<double, 4>;
#include "math.inl"
template <class S>
using Wide = Two<Vec, Halves>;  // of long chains of instructions
#include "words.inl"

struct Tiles {  // 32 registers: 6 x 4 sums, 4 right words, 1 left word; with fewer columns more rows hide the latency
  static constexpr int kColumns = 4;
  static constexpr int rows(int columns) { return columns == 4 ? 6 : 8; }
  static constexpr int64_t height(int64_t rest, int columns) {
    return rest >= rows(columns) ? rows(columns) : rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
  }
  static constexpr int below(int height) { return height > 4 ? 4 : height / 2; }
};
using BFloat16Word = float;
#include "kernels.inl"
}  // namespace

EXPORT_TABLE(avx512)
}  // namespace fastllm
