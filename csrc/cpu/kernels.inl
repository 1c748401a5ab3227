// The kernels of one op, FASTLLM_OP, on the Vec of the including file, and their table: setup.py compiles every
// instruction set's file once per op. Included inside an anonymous namespace: a function that two instruction sets
// shared would be linked once, and the linker may keep the copy that an older CPU cannot run.

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

// One entry per storage type, in the order of Type: float, bf16, half in fp32 arithmetic, double in its own. What an
// instruction set adds nothing to is null: dispatch.cpp takes the kernel of the next narrower one, and it is compiled
// once. AVX-512 has no double (VecD is the same everywhere), AVX512_BF16 nothing but bf16.
#if defined(__AVX512BF16__)
#define ENTRIES(f, b, h, d) {nullptr, b, nullptr, nullptr}
#elif defined(__AVX512F__)
#define ENTRIES(f, b, h, d) {f, b, h, nullptr}
#else
#define ENTRIES(f, b, h, d) {f, b, h, d}
#endif
#define PER_TYPE(kernel) ENTRIES((kernel<Vec, float>), (kernel<Vec, bf16>), (kernel<Vec, half>), (kernel<VecD, double>))
// Element by element, or sums over a row: two vectors at a time.
#define PER_WIDE(kernel) \
  ENTRIES((kernel<Wide<float>, float>), (kernel<Wide<bf16>, bf16>), (kernel<Wide<half>, half>), (kernel<VecD, double>))
#define PER_TYPE_AND_WORD(kernel)                                                                     \
  ENTRIES((kernel<Vec, float, float>), (kernel<Vec, bf16, BFloat16Word>), (kernel<Vec, half, float>), \
          (kernel<VecD, double, double>))

// <op>.inl ends with kTable.
#define QUOTED_(file) #file
#define QUOTED(file) QUOTED_(file)
#include QUOTED(FASTLLM_OP.inl)

#define TABLE_NAME_(op, isa) op##_##isa
#define TABLE_NAME(op, isa) TABLE_NAME_(op, isa)
#define EXPORT_TABLE(isa)                                    \
  extern const decltype(kTable) TABLE_NAME(FASTLLM_OP, isa); \
  const decltype(kTable) TABLE_NAME(FASTLLM_OP, isa) = kTable;
