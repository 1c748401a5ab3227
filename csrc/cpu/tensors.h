// What the CPU bindings share: types, converted weights, and work spread over torch's own threads.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "check.h"
#include "cpu/bindings.h"
#include "cpu/table.h"

namespace fastllm::cpu {
namespace {

#include "cpu/float16.inl"

using torch::headeronly::ScalarType;

inline Type type_of(const Tensor& x, const char* op) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return kFloat;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kHalf;
    case ScalarType::Double:
      return kDouble;
    default:
      CHECK(false, op, ": expected a float32, bfloat16, float16 or float64 tensor");
  }
  return kTypes;
}
inline int64_t bytes_of(Type t) { return t == kDouble ? 8 : t == kFloat ? 4 : 2; }
inline ScalarType compute_type(Type t) { return t == kDouble ? ScalarType::Double : ScalarType::Float; }

inline double element(const void* data, Type t, int64_t i) {
  switch (t) {
    case kFloat:
      return ((const float*)data)[i];
    case kBFloat16:
      return widen(((const bf16*)data)[i]);
    case kHalf:
      return widen(((const half*)data)[i]);
    default:
      return ((const double*)data)[i];
  }
}
inline void set_element(void* data, Type t, int64_t i, double x) {
  switch (t) {
    case kFloat:
      ((float*)data)[i] = float(x);
      break;
    case kBFloat16:
      narrow(float(x), ((bf16*)data)[i]);
      break;
    case kHalf:
      narrow(float(x), ((half*)data)[i]);
      break;
    default:
      ((double*)data)[i] = x;
  }
}

// A small tensor (a weight) in the compute type: where it lies if it has it and is contiguous, else converted.
class InComputeType {
 public:
  InComputeType(const MaybeTensor& x, Type compute, const char* op) {
    if (!x) return;
    const Type t = type_of(*x, op);
    if (x->is_contiguous() && t == (compute == kDouble ? kDouble : kFloat)) {
      data_ = x->data_ptr();
      return;
    }
    const Tensor flat = x->is_contiguous() ? *x : torch::stable::contiguous(*x);
    const int64_t n = flat.numel();
    if (compute == kDouble) {
      doubles_.resize(n);
      for (int64_t i = 0; i < n; ++i) doubles_[i] = element(flat.data_ptr(), t, i);
      data_ = doubles_.data();
    } else {
      floats_.resize(n);
      for (int64_t i = 0; i < n; ++i) floats_[i] = float(element(flat.data_ptr(), t, i));
      data_ = floats_.data();
    }
  }
  const void* data() const { return data_; }

 private:
  const void* data_ = nullptr;
  std::vector<float> floats_;
  std::vector<double> doubles_;
};

// Each thread keeps its workspace: fresh pages cost more than a small kernel. A very large one is given back.
inline void* workspace(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  constexpr int64_t kKeep = int64_t(64) << 20;
  if (bytes > size || (size > kKeep && bytes <= kKeep)) {
    memory.reset();
    size = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(4096, size));
    if (!memory) {
      size = 0;
      throw std::bad_alloc();
    }
  }
  return memory.get();
}

// f(item, workspace) for every item. Threads take the next item when they are free; which thread computes an item never
// changes its result.
template <class F>
void for_items(int64_t items, int64_t bytes, bool worth_threads, F f) {
  const int64_t threads = worth_threads ? std::min<int64_t>(torch::stable::get_num_threads(), items) : 1;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  auto work = [&](int64_t, int64_t) {
    try {
      void* memory = workspace(bytes);
      for (int64_t i; (i = next.fetch_add(1)) < items;) f(i, memory);
    } catch (const std::bad_alloc&) {  // an exception may not leave a thread of the pool
      failed = true;
    }
  };
  if (threads <= 1)
    work(0, 1);
  else
    torch::stable::parallel_for(0, threads, 1, work);
  CHECK(!failed, "fastllm: out of memory for a workspace of ", bytes, " bytes");
}

constexpr int64_t kGrain = 16384;  // elements that are worth waking another thread for (0.5 to 1.2 us)

// f(begin, end) over [0, n) in one piece per thread, with at least `grain` in each.
template <class F>
void for_range(int64_t n, int64_t grain, F f) {
  if (n <= grain || torch::stable::get_num_threads() <= 1)
    f(0, n);
  else
    torch::stable::parallel_for(0, n, grain, f);
}

inline std::vector<int64_t> shape_of(const Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes.data(), sizes.data() + sizes.size()};
}

// glibc gives every block of 32 MiB and more back to the system, so that each output of that size is made of fresh
// pages, and a fault per 4 KiB costs more than the kernel that writes it. Asked for 2 MiB pages, the system makes 512
// times fewer; where it has none at hand, or is set to "never", nothing changes.
inline void prefer_huge_pages(const Tensor& x, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kPage = int64_t(2) << 20, kMapped = int64_t(32) << 20;
  if (bytes < kMapped) return;
  const int64_t data = (int64_t)x.data_ptr();
  const int64_t begin = (data + kPage - 1) / kPage * kPage, end = (data + bytes) / kPage * kPage;
  madvise((void*)begin, size_t(end - begin), MADV_HUGEPAGE);
#endif
}

// Fresh memory, dense in the order of `strides`. It does not go through the dispatcher, which takes as long as a small
// kernel; so what PyTorch does to fresh memory under deterministic algorithms, which is how the tests see an element
// that no kernel wrote, is a switch of its own.
inline Tensor empty_strided(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType type) {
  AtenTensorHandle made;
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &made));
  const Tensor x(made);
  int64_t bytes = int64_t(x.element_size());
  for (int64_t n : shape) bytes *= n;
  prefer_huge_pages(x, bytes);
  if (poison_fresh_memory && bytes) std::memset(x.data_ptr(), 0xff, size_t(bytes));
  return x;
}
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType type) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(1, shape[i])) strides[i] = stride;
  return empty_strided(shape, strides, type);
}
// Whether a kernel writes rows of D numbers of an output past the caches: one that no cache holds would be read into
// them first, line by line, to be written over. Rows then consist of whole vectors. With what it is made from, 12 MiB
// fill most of a third-level cache of 32 MiB; bench/NOTES.md has what was measured around it.
inline bool streams(const Tensor& y, int64_t D) {
  constexpr int64_t kStreamed = int64_t(12) << 20;
  const int64_t element = int64_t(y.element_size());
  return y.numel() * element >= kStreamed && D * element % 64 == 0 && (int64_t)y.data_ptr() % 64 == 0;
}
inline Tensor none_like(const Tensor& x) { return empty({0}, x.scalar_type()); }

// A new [B, H, T, D] in the memory order of `like` (heads inside positions where `like` is a view of [B, T, H, D]).
inline Tensor new_heads(const Tensor& like, int64_t D) {
  const int64_t B = like.size(0), H = like.size(1), T = like.size(2);
  const bool inside = like.stride(1) < like.stride(2);
  auto at_least_1 = [](int64_t n) { return std::max<int64_t>(1, n); };
  const int64_t position = inside ? at_least_1(H) * D : D, head = inside ? D : at_least_1(T) * D;
  return empty_strided({B, H, T, D}, {at_least_1(H) * at_least_1(T) * D, head, position, 1}, like.scalar_type());
}

inline void check_like(const Tensor& got, const Tensor& like, const char* op, const char* name) {
  CHECK(got.is_contiguous() && got.numel() == like.numel() && got.scalar_type() == like.scalar_type(), op, ": ", name,
        " must be contiguous, with the shape and dtype of x");
}
inline uint64_t seed_of(const MaybeTensor& seed, const char* op) {
  CHECK(seed && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, op, ": dropout needs a seed, one int64");
  return uint64_t(*(const int64_t*)seed->data_ptr());
}
inline void check_weight(const MaybeTensor& w, int64_t D, const char* op, const char* name) {
  CHECK(!w || (w->dim() == 1 && w->numel() == D), op, ": ", name, " must be [", D, "], got ", w ? w->numel() : 0,
        " elements");
}

// Stripes of rows have partial sums of their own, and their number depends on N alone: the weight gradients are the
// same for any number of threads.
inline int64_t stripes_of(int64_t N) { return std::min<int64_t>(64, (N + 7) / 8); }

// f(stripe, begin, end) for the rows [begin, end) of every stripe.
template <class F>
void for_stripes(int64_t N, int64_t D, F f) {
  const int64_t stripes = stripes_of(N);
  for_range(stripes, std::max<int64_t>(1, kGrain * stripes / std::max<int64_t>(1, N * D)),
            [&](int64_t begin, int64_t end) {
              for (int64_t s = begin; s < end; ++s) f(s, N * s / stripes, N * (s + 1) / stripes);
            });
}

template <class T>
void add_stripes(const T* partial, int64_t stripes, int64_t D, int64_t begin, int64_t end, double* sum) {
  for (int64_t s = 0; s < stripes; ++s)
    for (int64_t d = begin; d < end; ++d) sum[d - begin] += double(partial[s * D + d]);
}
// out[d] = sum over stripes of partial[stripe][d], in order, rounded to out's type.
inline void sum_stripes(const void* partial, Type compute, int64_t stripes, int64_t D, const Tensor& out,
                        const char* op) {
  const Type t = type_of(out, op);
  void* data = out.data_ptr();
  for_range(D, kGrain / 16, [&](int64_t begin, int64_t end) {
    std::vector<double> sum(end - begin, 0.0);
    if (compute == kDouble)
      add_stripes((const double*)partial, stripes, D, begin, end, sum.data());
    else
      add_stripes((const float*)partial, stripes, D, begin, end, sum.data());
    for (int64_t d = begin; d < end; ++d) set_element(data, t, d, sum[d - begin]);
  });
}

}  // namespace
}  // namespace fastllm::cpu
