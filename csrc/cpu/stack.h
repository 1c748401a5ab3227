// What the stacks of layers share that Python describes and that one call goes through: addresses, norms, and threads
// that are started once and meet at barriers.
#pragma once
#include <pybind11/stl.h>

#include <condition_variable>
#include <mutex>
#include <thread>

#include "cpu/tensors.h"

namespace py = pybind11;

namespace fastllm::cpu {
namespace {

template <class X>
X* address(const py::object& x) {
  return x.is_none() ? nullptr : (X*)x.cast<uintptr_t>();
}

struct Normalise {
  Norm a{};
  bool centred = false, present = false;

  Normalise() = default;
  explicit Normalise(const py::object& o) {
    if (o.is_none()) return;
    const py::dict d = o;
    present = true;
    centred = d["centred"].cast<bool>();
    a.D = d["width"].cast<int64_t>();
    a.eps = d["eps"].cast<double>();
    a.weight_offset = d["offset"].cast<double>();
    a.weight = address<void>(d["weight"]);
    a.bias = address<void>(d["bias"]);
  }
  // y = norm(x), rows of D; y may be x.
  void operator()(const float* x, float* y, int64_t rows) const {
    float mean, rstd;
    for (int64_t row = 0; row < rows; ++row) {
      Norm one = a;
      one.x = x + row * a.D;
      one.y = y + row * a.D;
      one.mean = &mean;
      one.rstd = &rstd;
      (centred ? kernels().norm->layer_norm_fwd : kernels().norm->rms_norm_fwd)[kFloat](one, 0, 1);
    }
  }
};

// Threads of one parallel region that wait for each other: spinning, which costs least where all of them run, and after
// a while asleep, since on a busy machine who spins keeps the core from who is waited for.
class Barrier {
 public:
  explicit Barrier(int members) : members_(members) {}
  void wait() {
    const int turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1);
      if (asleep_.load()) {
        const std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
      }
      return;
    }
    for (int spins = 0; spins < kSpins; ++spins) {
      if (turn_.load(std::memory_order_acquire) != turn) return;
#if defined(__x86_64__) && defined(__GNUC__)
      __builtin_ia32_pause();
#endif
    }
    std::unique_lock<std::mutex> lock(mutex_);
    ++asleep_;
    wake_.wait(lock, [&] { return turn_.load() != turn; });
    --asleep_;
  }

 private:
  static constexpr int kSpins = 4000;  // some 50 us: longer than threads of one step ever wait where all run
  const int members_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> turn_{0};
  std::atomic<int> asleep_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// f(member, members, barrier) on torch's threads, which all run at once or, where torch has only one to give, on one.
template <class F>
void run_team(int64_t threads, F f) {
  if (threads <= 1) {
    Barrier alone(1);
    return f(0, 1, alone);
  }
  std::atomic<Barrier*> shared{nullptr};
  std::atomic<int64_t> chunk{0};
  std::unique_ptr<Barrier> barrier;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (begin == 0) {  // the first piece is as long as any: from it follows how many there are
      chunk = end;
      barrier.reset(new Barrier(int((threads + end - 1) / end)));
      shared = barrier.get();
    }
    while (!shared.load()) std::this_thread::yield();
    f(int(begin / chunk), int((threads + chunk - 1) / chunk), *shared.load());
  });
}

}  // namespace
}  // namespace fastllm::cpu
