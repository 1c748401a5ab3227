// All kernels on the Vec of the including file, and their table. Included inside an anonymous namespace: a function
// that two instruction sets shared would be linked once, and the linker may keep the copy that an older CPU cannot run.

struct Arena {  // pieces of one block of memory, each on its own cache line; with no memory it only counts
  char* memory;
  int64_t used;
  template <class X>
  X* take(int64_t n) {
    char* p = memory + used;
    used += (n * int64_t(sizeof(X)) + 63) / 64 * 64;
    return (X*)p;
  }
};

#include "norm.inl"
#include "softmax.inl"
#include "tile.inl"
#include "attention_scores.inl"
#include "attention.inl"
#include "attention_bwd.inl"

// One entry per storage type, in the order of Type: float, bf16, half in fp32 arithmetic, double in its own.
#define PER_TYPE(kernel) {kernel<Vec, float>, kernel<Vec, bf16>, kernel<Vec, half>, kernel<VecD, double>}
#define PER_TYPE_AND_WORD(kernel) \
  {kernel<Vec, float, float>, kernel<Vec, bf16, BFloat16Word>, kernel<Vec, half, float>, kernel<VecD, double, double>}
#define KERNEL_TABLE(name)                 \
  {name,                                   \
   PER_TYPE(layer_norm_fwd),               \
   PER_TYPE(layer_norm_bwd),               \
   PER_TYPE(rms_norm_fwd),                 \
   PER_TYPE(rms_norm_bwd),                 \
   PER_TYPE(softmax_fwd),                  \
   PER_TYPE(softmax_bwd),                  \
   PER_TYPE_AND_WORD(attention_fwd_items), \
   PER_TYPE_AND_WORD(attention_fwd_bytes), \
   PER_TYPE_AND_WORD(attention_fwd),       \
   PER_TYPE_AND_WORD(attention_bwd_items), \
   PER_TYPE_AND_WORD(attention_bwd_bytes), \
   PER_TYPE_AND_WORD(attention_bwd),       \
   PER_TYPE(attention_bwd_sum_dq)}
