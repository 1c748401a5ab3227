// The most multiply-adds that all threads can do at once.
#include "cpu/tensors.h"

namespace fastllm::cpu {

double multiply_adds(int64_t rounds, bool bf16) {
  const auto run = kernels().peak->multiply_adds[bf16 ? kBFloat16 : kFloat];
  std::atomic<double> done{0};
  for_items(torch::stable::get_num_threads(), 256, true, [&](int64_t, void* memory) {
    const double more = run(rounds, memory);
    for (double before = done; !done.compare_exchange_weak(before, before + more);) {
    }
  });
  return done;
}

}  // namespace fastllm::cpu
