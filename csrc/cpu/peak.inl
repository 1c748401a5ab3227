// Multiply-adds that wait for nothing, in registers alone: the most that this CPU can do, which the bench holds rates
// against.

// Returns how many operations they are; `sink` keeps them from being left out.
template <class V, class S, class W>
double multiply_adds(int64_t rounds, void* sink) {
  using X = Words<V, W>;
  constexpr int kSums = 12;  // a sum takes 4 or 5 cycles, and two are begun in each
  const W word[1] = {};
  typename X::Vector a = X::broadcast(word), b = a;
  V sum[kSums];
  UNROLLED for (int i = 0; i < kSums; ++i) sum[i] = V::set(i);
  for (int64_t r = 0; r < rounds; ++r) {
    UNROLLED for (int i = 0; i < kSums; ++i) sum[i] = X::dot(a, b, sum[i]);
  }
  V total = sum[0];
  UNROLLED for (int i = 1; i < kSums; ++i) total = total + sum[i];
  total.store((typename V::T*)sink);
  return 2.0 * X::kPer * V::L * kSums * double(rounds);
}

constexpr PeakKernels kTable = {PER_TYPE_AND_WORD(multiply_adds)};
