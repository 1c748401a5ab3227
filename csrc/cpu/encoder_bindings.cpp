// An encoder like BERT's, described once, that then takes packed sequences through all of its layers in one call:
// x = norm(x + out(attend(qkv(x)))), x = norm(x + down(act(up(x)))).
//
// The weights are kept in the panels that the matrix product reads: for some 30 rows, copying them there would take as
// long as the product. Where there are rows enough, a thread takes a block of them from one attention to the next while
// it is in its cache, so that threads wait for each other twice a layer; where there are few, they share the columns of
// each product, so that each weight is read once. fastllm/encoder.py makes the description.
#include "cpu/encoder.h"

#include "cpu/gemm.h"
#include "cpu/stack.h"

namespace fastllm::cpu {
namespace {

constexpr int64_t kBlock = 48;           // rows that a thread takes at a time: their hidden layer is in its cache
constexpr int64_t kFewRows = 32;         // a thread: with fewer, the columns are shared out
constexpr double kWorthAThread = 4.0e6;  // multiplications in a layer

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<char, Free>;

Memory allocate(int64_t bytes) {
  Memory made((char*)std::aligned_alloc(4096, size_t(bytes + 4095) / 4096 * 4096));
  if (!made) throw std::bad_alloc();
  return made;
}

// A weight [N, K] in panels, and its bias [N].
struct Panels {
  int64_t N, K;
  std::shared_ptr<char> memory;
  std::vector<float> bias;

  explicit Panels(const py::dict& d) : N(d["rows"].cast<int64_t>()), K(d["columns"].cast<int64_t>()) {
    if (const float* from = address<float>(d["bias"])) bias.assign(from, from + N);
    const int64_t width = kernels().linear->panel[kFloat](), columns = (N + width - 1) / width * width;
    memory = allocate(columns * K * int64_t(sizeof(float)));
    kernels().linear->pack[kFloat]({address<void>(d["weight"]), 1, K}, K, N, memory.get());
  }
  // y = x w^T + bias, or its activation: part `part` of `parts` of the columns, for `rows` rows.
  void multiply(const float* x, float* y, int64_t rows, int64_t part, int64_t parts, void* workspace,
                const int* activation = nullptr) const {
    Gemm g{rows, N, K, {x, K, 1}, {memory.get(), 0, 0}, y, N};
    g.panels = true;
    g.bias = bias.empty() ? nullptr : bias.data();
    if (activation) g.y = y, g.activation = *activation;
    const int64_t width = kernels().linear->panel[kFloat](), panels = (N + width - 1) / width;
    const int64_t begin = panels * part / parts * width, end = std::min(N, panels * (part + 1) / parts * width);
    kernels().linear->gemm[kFloat](g, 0, rows, begin, end, workspace);
  }
};

struct EncoderLayer {
  Panels qkv, out, up, down;
  Normalise attention_norm, feed_norm;

  explicit EncoderLayer(const py::dict& d)
      : qkv(py::dict(d["qkv"])),
        out(py::dict(d["out"])),
        up(py::dict(d["up"])),
        down(py::dict(d["down"])),
        attention_norm(py::object(d["attention_norm"])),
        feed_norm(py::object(d["feed_norm"])) {}
};

class Encoder {
 public:
  explicit Encoder(const py::dict& d)
      : heads_(d["heads"].cast<int64_t>()),
        activation_(d["activation"].cast<int>()),
        scale_(d["scale"].cast<double>()),
        threads_(d["threads"].cast<int64_t>()),
        panel_(kernels().linear->panel[kFloat]()) {
    for (const py::handle& layer : py::list(d["layers"])) layers_.emplace_back(py::reinterpret_borrow<py::dict>(layer));
    width_ = layers_.at(0).out.N;
    feed_ = layers_.at(0).up.N;
  }

  // x [N, width] fp32 in place, its sequences one after the other: `bounds` are where they begin, and N.
  void run(uintptr_t x, const std::vector<int64_t>& bounds) const {
    if (kernels().linear->panel[kFloat]() != panel_)
      throw std::runtime_error("Encoder: its weights were packed for another instruction set");
    py::gil_scoped_release others_may_run;
    Call call;
    call.x = (float*)x;
    call.N = bounds.back();
    if (!call.N) return;
    const double work = double(call.N) * width_ * (4 * width_ + 2 * feed_);
    const int64_t members = std::max<int64_t>(
        1, std::min({threads_, int64_t(torch::stable::get_num_threads()), 1 + int64_t(work / kWorthAThread)}));
    call.by_rows = members == 1 || call.N >= members * kFewRows;
    const int64_t blocks = ((call.N + kBlock - 1) / kBlock + members - 1) / members * members;
    call.block = call.by_rows ? (call.N + blocks - 1) / blocks : call.N;
    call.turns.reset(new std::atomic<int64_t>[2 * layers_.size() + 1]());

    auto floats = [](int64_t n) { return (n * int64_t(sizeof(float)) + 63) / 64 * 64; };
    const int64_t scratch = floats(call.block * width_) + floats(call.block * feed_);
    Attention whole{};
    whole.B = 1, whole.H = whole.Hkv = heads_, whole.D = whole.Dv = width_ / heads_;
    whole.scale = scale_, whole.left = whole.right = -1;
    int64_t most = kernels().linear->gemm_bytes[kFloat]({});
    for (size_t n = 0; n + 1 < bounds.size(); ++n) {
      whole.T = whole.S = bounds[n + 1] - bounds[n];
      if (!whole.T) continue;
      call.parts.push_back(whole);
      call.begins.push_back(bounds[n]);
      call.first.push_back(call.first.back() + kernels().attention->items[kFloat](whole));
      most = std::max(most, kernels().attention->bytes[kFloat](whole));
    }
    most = (most + 63) / 64 * 64;
    const int64_t shared = floats(call.N * 3 * width_) + floats(call.N * width_);
    char* memory = (char*)workspace(shared + (call.by_rows ? members * scratch : scratch) + members * most);
    call.qkv = (float*)memory;
    call.attended = (float*)(memory + floats(call.N * 3 * width_));
    for (size_t n = 0; n < call.parts.size(); ++n) {
      Attention& a = call.parts[n];
      float *qkv = call.qkv + call.begins[n] * 3 * width_, *o = call.attended + call.begins[n] * width_;
      a.q = {qkv, 0, a.D, 3 * width_, 1, nullptr, 0};
      a.k = {qkv + width_, 0, a.D, 3 * width_, 1, nullptr, 0};
      a.v = {qkv + 2 * width_, 0, a.D, 3 * width_, 1, nullptr, 0};
      a.o = {o, 0, a.D, width_, 1, nullptr, 0};
    }
    memory += shared;
    run_team(members, [&](int member, int count, Barrier& barrier) {
      char* own = memory + (call.by_rows ? member * scratch : 0);
      char* workspace = memory + (call.by_rows ? members * scratch : scratch) + member * most;
      go(call, {(float*)own, (float*)(own + floats(call.block * width_)), workspace, member, count, barrier});
    });
  }

 private:
  struct Call {
    float *x, *qkv, *attended;  // [N, width], [N, 3 * width], [N, width]
    int64_t N, block;           // tokens, and rows of a block
    bool by_rows;
    std::vector<Attention> parts;  // a sequence each
    std::vector<int64_t> begins, first{0};
    std::unique_ptr<std::atomic<int64_t>[]> turns;  // next block or next item of attention, of each stage
  };
  struct Member {
    float *delta, *hidden;  // [block, width], [block, feed]
    void* workspace;
    int member, members;
    Barrier& barrier;
  };

  // f(first row, rows, part, parts) for this thread's share: whole blocks, or its part of the columns of all rows.
  template <class F>
  static void for_blocks(const Call& call, const Member& my, int stage, F f) {
    if (!call.by_rows) return f(0, call.N, my.member, my.members);
    for (int64_t row; (row = call.turns[stage].fetch_add(1) * call.block) < call.N;)
      f(row, std::min(call.block, call.N - row), 0, 1);
  }

  void attend(const Call& call, const Member& my, int stage) const {
    const AttentionKernels& table = *kernels().attention;
    for (int64_t item; (item = call.turns[stage].fetch_add(1)) < call.first.back();) {
      const size_t n = std::upper_bound(call.first.begin(), call.first.end(), item) - call.first.begin() - 1;
      table.run[kFloat](call.parts[n], item - call.first[n], my.workspace);
    }
  }

  // Rows of x from what attention made of them to the input of the next attention.
  void between(const Call& call, const Member& my, size_t n, int64_t row, int64_t rows, int64_t part,
               int64_t parts) const {
    const EncoderLayer& l = layers_[n];
    float* x = call.x + row * width_;
    auto meet = [&] {
      if (parts > 1) my.barrier.wait();
    };
    auto add_and_norm = [&](const Normalise& norm) {
      const int64_t begin = rows * part / parts, count = rows * (part + 1) / parts - begin;
      kernels().generation->add(x + begin * width_, my.delta + begin * width_, count * width_);
      norm(x + begin * width_, x + begin * width_, count);
      meet();
    };
    l.out.multiply(call.attended + row * width_, my.delta, rows, part, parts, my.workspace);
    meet();
    add_and_norm(l.attention_norm);
    l.up.multiply(x, my.hidden, rows, part, parts, my.workspace, &activation_);
    meet();
    l.down.multiply(my.hidden, my.delta, rows, part, parts, my.workspace);
    meet();
    add_and_norm(l.feed_norm);
    if (n + 1 < layers_.size())
      layers_[n + 1].qkv.multiply(x, call.qkv + row * 3 * width_, rows, part, parts, my.workspace);
  }

  void go(const Call& call, const Member& my) const {
    for_blocks(call, my, 0, [&](int64_t row, int64_t rows, int64_t part, int64_t parts) {
      layers_[0].qkv.multiply(call.x + row * width_, call.qkv + row * 3 * width_, rows, part, parts, my.workspace);
    });
    for (size_t n = 0; n < layers_.size(); ++n) {
      my.barrier.wait();
      attend(call, my, int(2 * n + 1));
      my.barrier.wait();
      for_blocks(call, my, int(2 * n + 2), [&](int64_t row, int64_t rows, int64_t part, int64_t parts) {
        between(call, my, n, row, rows, part, parts);
      });
    }
  }

  const int64_t heads_;
  const int activation_;
  const double scale_;
  const int64_t threads_, panel_;
  int64_t width_, feed_;
  std::vector<EncoderLayer> layers_;
};

}  // namespace

void bind_encoder(py::module_& m) {
  py::class_<Encoder>(m, "Encoder", "All layers of a described encoder; see fastllm/encoder.py.")
      .def(py::init<const py::dict&>())
      .def("run", &Encoder::run, "run(x, bounds): the address of fp32 memory, and where its sequences begin and end.");
}

}  // namespace fastllm::cpu
