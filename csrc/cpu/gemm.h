// The matrix product of the CPU kernels, for bindings that need one inside an op.
#pragma once
#include "cpu/table.h"

namespace fastllm::cpu {

// c = a b, or c += a b: a Gemm (table.h) of numbers of one type, over torch's threads, or with threads = 1 in the
// calling thread, which may then be one of torch's own. Every number of c has the same bits for any number of threads.
// c may not overlap a or b. Takes at most 0.6 MB (double: 1 MB, bf16 and fp16: 3 MB) of memory a thread, which it
// keeps.
//
//   Gemm logits{T, V, D, {x, D, 1}, {weight, 1, D}, out, V};  // [T, D] times the transpose of [V, D]
//   gemm(logits);
void gemm(const Gemm& product, Type type = kFloat, int64_t threads = 0);

}  // namespace fastllm::cpu
