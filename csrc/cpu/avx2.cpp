// AVX2 with FMA and F16C.
#include "cpu/isa.h"

namespace fastllm {
namespace {
#include "float16.inl"
#include "vec_array.inl"
#include "vec_avx2.inl"
using VecD = ArrayVec<double, 4>;
#include "math.inl"
template <class S>
struct Lie {
  using Order = Halves;
};
template <>
struct Lie<bf16> {
  using Order = EvenOdd;
};
template <class S>
using Wide = Two<Vec, typename Lie<S>::Order>;  // of long chains of instructions
#include "words.inl"

struct Tiles {  // 16 registers: 6 x 2 sums, 2 right words, 1 left word
  static constexpr int kColumns = 2;
  static constexpr int rows(int columns) { return columns == 2 ? 6 : 8; }
  // 8 chains of sums at least, to hide an FMA's latency: 8 rows are 4 and 4, not 6 and 2.
  static constexpr int64_t height(int64_t rest, int columns) {
    const int64_t most = rows(columns);
    return rest >= 2 * most ? most : rest > most ? (rest + 1) / 2 : rest;
  }
  static constexpr int below(int height) { return height - 1; }
};
using BFloat16Word = float;
#include "kernels.inl"
}  // namespace

EXPORT_TABLE(avx2)
}  // namespace fastllm
