// A decoder-only transformer, described once, that then computes one new token of some of its sequences per call.
//
// The threads are started once a call and meet at barriers, four a layer: a fork per op would cost more than the op.
// What is cheap (norms, the residual stream, splitting activations into planes) every thread does for itself; what
// reads weights or the cache is shared out. fastllm/generation.py makes the description and keeps its tensors alive.
#include "cpu/generation.h"

#include <string>

#include "cpu/stack.h"

namespace fastllm::cpu {
namespace {

constexpr int64_t kPanel = 16;  // rows of a weight that are never shared out

struct Projection {
  WeightOnly a{};
  Type stored = kFloat;

  explicit Projection(const py::dict& d) {
    a.N = d["rows"].cast<int64_t>();
    a.K = d["columns"].cast<int64_t>();
    a.weight = address<void>(d["weight"]);
    a.bias = address<float>(d["bias"]);
    a.bits = d["bits"].cast<int64_t>();
    stored = Type(d["stored"].cast<int>());
    if (packed()) {
      a.group = d["group"].cast<int64_t>();
      a.scales = address<void>(d["scales"]);
      a.offsets = address<void>(d["offsets"]);
      a.planes = 2;  // 16 bits of an activation: far below what 8 bits of a weight leave out
    }
  }
  bool packed() const { return a.bits == 8 || a.bits == 4; }
  int64_t bytes(int64_t B) const {  // of prepared activations
    WeightOnly b = a;
    b.M = B;
    return packed() ? kernels().weight_only->bytes(b) : 0;
  }
};

struct Layer {
  Normalise attention_norm, q_norm, k_norm, after_attention, feed_norm, after_feed;
  std::vector<Projection> qkv;                  // one, or three
  std::vector<Projection> out, gate, up, down;  // one each, up perhaps none
  bool parallel;                                // both branches read the same input
  int64_t window;                               // keys that a query sees, itself among them; 0 is all
  const float *cos, *sin;                       // [positions, rotated / 2]; null without rotation
  char *k, *v;                                  // [slots, kv heads, positions, D]
};

std::vector<Projection> projections(const py::object& o) {
  std::vector<Projection> made;
  for (const py::handle& d : py::list(o)) made.emplace_back(py::reinterpret_borrow<py::dict>(d));
  return made;
}

class Decoder {
 public:
  explicit Decoder(const py::dict& d)
      : slots_(d["slots"].cast<int64_t>()),
        positions_(d["positions"].cast<int64_t>()),
        width_(d["width"].cast<int64_t>()),
        heads_(d["heads"].cast<int64_t>()),
        kv_heads_(d["kv_heads"].cast<int64_t>()),
        D_(d["head_dim"].cast<int64_t>()),
        rotated_(d["rotated"].cast<int64_t>()),
        feed_(d["feed"].cast<int64_t>()),
        activation_(d["activation"].cast<int>()),
        cache_type_(Type(d["cache_type"].cast<int>())),
        scale_(d["scale"].cast<float>()),
        softcap_(d["softcap"].cast<float>()),
        logit_softcap_(d["logit_softcap"].cast<float>()),
        embedding_scale_(d["embedding_scale"].cast<float>()),
        embedding_(py::dict(d["embedding"])),
        places_(address<float>(d["places"])),
        final_norm_(py::object(d["final_norm"])),
        head_(py::dict(d["head"])) {
    for (const py::handle& handle : py::list(d["layers"])) {
      const py::dict l = py::reinterpret_borrow<py::dict>(handle);
      Layer layer;
      layer.attention_norm = Normalise(py::object(l["attention_norm"]));
      layer.q_norm = Normalise(py::object(l["q_norm"]));
      layer.k_norm = Normalise(py::object(l["k_norm"]));
      layer.after_attention = Normalise(py::object(l["after_attention"]));
      layer.feed_norm = Normalise(py::object(l["feed_norm"]));
      layer.after_feed = Normalise(py::object(l["after_feed"]));
      layer.qkv = projections(l["qkv"]);
      layer.out = projections(l["out"]);
      layer.gate = projections(l["gate"]);
      layer.up = projections(l["up"]);
      layer.down = projections(l["down"]);
      layer.parallel = l["parallel"].cast<bool>();
      layer.window = l["window"].cast<int64_t>();
      layer.cos = address<float>(l["cos"]);
      layer.sin = address<float>(l["sin"]);
      layer.k = address<char>(l["k"]);
      layer.v = address<char>(l["v"]);
      layers_.push_back(layer);
    }
    const int64_t B = slots_;
    qkv_.resize(B * (heads_ + 2 * kv_heads_) * D_);
    hidden_.resize(B * feed_);
    gated_.resize(B * feed_);
    delta_.resize(B * width_);
    attended_.resize(B * heads_ * D_ * bytes_);
    lse_.resize(B * heads_);
    most_splits_ = splits_of(positions_);
    parts_.resize(B * heads_ * most_splits_ * (D_ + 2));
    threads_ = std::max<int64_t>(1, std::min<int64_t>(d["threads"].cast<int64_t>(), torch::stable::get_num_threads()));
    int64_t prepared = head_.bytes(B);
    for (const Layer& l : layers_)
      for (const auto* list : {&l.qkv, &l.out, &l.gate, &l.up, &l.down})
        for (const Projection& p : *list) prepared = std::max(prepared, p.bytes(B));
    for (int t = 0; t < threads_; ++t) own_.emplace_back(*this, prepared);
  }

  // logits [B, vocabulary] for the new `tokens` [B] of the sequences `slots` [B], each behind its `lengths` [B] tokens.
  void step(int64_t B, uintptr_t tokens, uintptr_t lengths, uintptr_t slots, uintptr_t logits) {
    py::gil_scoped_release others_may_run;
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), threads_);
    const Step now{B, (const int64_t*)tokens, (const int64_t*)lengths, (const int64_t*)slots, (float*)logits};
    run_team(threads, [&](int member, int members, Barrier& barrier) { run(now, member, members, barrier); });
  }

 private:
  struct Step {
    int64_t B;
    const int64_t *tokens, *lengths, *slots;
    float* logits;
  };
  struct Own {  // of one thread
    std::vector<float> x, normed, row, panel;
    std::vector<char> q, workspace, prepared;
    Own(const Decoder& d, int64_t bytes)
        : x(d.slots_ * d.width_),
          normed(d.slots_ * std::max(d.width_, d.heads_ * d.D_)),
          row(d.D_),
          panel(d.embedding_.packed() ? kPanel * d.width_ : 0),
          q(d.heads_ / d.kv_heads_ * d.D_ * d.bytes_),
          workspace(kernels().attention_decode->bytes[d.cache_type_](d.sizes(1)) + 64),
          prepared(bytes + 64) {}
  };
  static void* aligned(const std::vector<char>& memory) { return (void*)((uintptr_t(memory.data()) + 63) / 64 * 64); }

  Attention sizes(int64_t keys) const {  // of the queries that share a key head, one sequence's
    Attention a{};
    a.B = a.Hkv = a.T = a.splits = 1;
    a.H = heads_ / kv_heads_;
    a.S = keys;
    a.D = a.Dv = D_;
    return a;
  }
  int64_t splits_of(int64_t keys) const { return kernels().attention_decode->splits[cache_type_](sizes(keys)); }

  // This thread's rows of y = x w^T + bias, x being [B, K]; `ready` says that x is prepared for a weight with its steps
  // already.
  std::pair<int64_t, int64_t> share(const Projection& p, int64_t B, const float* x, float* y, int64_t y_row, Own& own,
                                    int64_t& ready, int member, int members) const {
    WeightOnly a = p.a;
    a.M = B;
    a.x = x;
    a.x_row = a.K;
    a.y = y;
    a.y_row = y_row;
    const int64_t panels = (a.N + kPanel - 1) / kPanel;
    const int64_t begin = panels * member / members, end = panels * (member + 1) / members;
    const WeightOnlyKernels& k = *kernels().weight_only;
    if (p.packed()) {
      const int64_t kind =
          (a.bits == 8 ? 1 : 2) + 4 * ((a.K + a.group - 1) / a.group * a.group) + (a.group % 64 ? 0 : 1 << 30);
      if (ready != kind) k.prepare(a, aligned(own.prepared));
      ready = kind;
      k.panels[a.bits == 8](a, aligned(own.prepared), begin, end);
    } else {
      k.rows[p.stored](a, begin * kPanel, std::min(end * kPanel, a.N));
    }
    return {begin * kPanel, std::min(end * kPanel, a.N)};
  }

  void embed(const Step& now, Own& own) const {
    const int64_t bytes = embedding_.stored == kFloat ? 4 : 2;
    for (int64_t b = 0; b < now.B; ++b) {
      const int64_t token = now.tokens[b];
      float* row = own.x.data() + b * width_;
      if (embedding_.packed()) {
        kernels().weight_only->dequantize[kFloat](embedding_.a, token / kPanel, token / kPanel + 1, own.panel.data());
        memcpy(row, own.panel.data() + token % kPanel * width_, width_ * sizeof(float));
      } else {
        const char* from = (const char*)embedding_.a.weight + token * width_ * bytes;
        kernels().weight_only->widen[embedding_.stored](from, row, width_);
      }
      if (embedding_scale_ != 1)
        for (int64_t i = 0; i < width_; ++i) row[i] *= embedding_scale_;
      if (places_) kernels().generation->add(row, places_ + now.lengths[b] * width_, width_);
    }
  }

  // The attention of the query heads of key head h in the b-th of these sequences.
  Attention attention_of(const Layer& l, const Step& now, int64_t b, int64_t h, void* q) {
    const int64_t length = now.lengths[b], group = b * kv_heads_ + h;
    const int64_t cache = (now.slots[b] * kv_heads_ + h) * positions_ * D_ * bytes_;
    Attention a = sizes(length + 1);
    a.scale = scale_;
    a.softcap = softcap_;
    a.q_offset = length;
    a.left = l.window ? l.window - 1 : -1;
    a.right = -1;
    a.q = {q, 0, D_, D_, 1, nullptr, 0};
    a.k = {l.k + cache, 0, 0, D_, 1, nullptr, 0};
    a.v = {l.v + cache, 0, 0, D_, 1, nullptr, 0};
    a.o = {attended_.data() + group * a.H * D_ * bytes_, 0, D_, D_, 1, nullptr, 0};
    a.lse = lse_.data() + group * a.H;
    a.lse_h = 1;
    a.splits = kernels().attention_decode->splits[cache_type_](a);
    a.partial = parts_.data() + group * most_splits_ * a.H * (D_ + 2);
    return a;
  }

  // The part `split` of it. The last one has the new key and puts it into the cache.
  void attend(const Layer& l, const Step& now, int64_t b, int64_t h, int64_t split, Own& own) {
    const Attention a = attention_of(l, now, b, h, own.q.data());
    if (split >= a.splits) return;
    const int64_t length = now.lengths[b], half = rotated_ / 2;
    const float* fresh = qkv_.data() + b * (heads_ + 2 * kv_heads_) * D_;
    const auto narrow = kernels().weight_only->narrow[cache_type_];
    auto place = [&](const Normalise& norm, const float* from, char* to) {
      float* x = own.row.data();
      norm.present ? norm(from, x, 1) : (void)memcpy(x, from, D_ * sizeof(float));
      if (l.cos) kernels().generation->rotate(x, l.cos + length * half, l.sin + length * half, half);
      narrow(x, to, D_);
    };
    for (int64_t g = 0; g < a.H; ++g) place(l.q_norm, fresh + (h * a.H + g) * D_, own.q.data() + g * D_ * bytes_);
    if (split == a.splits - 1) {
      place(l.k_norm, fresh + (heads_ + h) * D_, (char*)a.k.data + length * D_ * bytes_);
      narrow(fresh + (heads_ + kv_heads_ + h) * D_, (char*)a.v.data + length * D_ * bytes_, D_);
    }
    kernels().attention_decode->run[cache_type_](a, split, aligned(own.workspace));
  }

  void run(const Step& now, int member, int members, Barrier& barrier) {
    Own& own = own_[member];
    float *x = own.x.data(), *normed = own.normed.data();
    const int64_t B = now.B, total = (heads_ + 2 * kv_heads_) * D_;
    const GenerationKernels& kernel = *kernels().generation;
    auto norm = [&](const Normalise& n) -> const float* {
      if (!n.present) return x;
      n(x, normed, B);
      return normed;
    };
    auto add_delta = [&](const Normalise& n) {
      const float* y = delta_.data();
      if (n.present) n(y, normed, B), y = normed;
      kernel.add(x, y, B * width_);
    };
    const int64_t groups = B * kv_heads_;
    int64_t most = 0;  // parts of the keys of any sequence now
    for (int64_t b = 0; b < B; ++b) most = std::max(most, splits_of(now.lengths[b] + 1));
    embed(now, own);
    for (const Layer& l : layers_) {
      int64_t ready = 0, offset = 0;
      const float* in = norm(l.attention_norm);
      for (const Projection& p : l.qkv) {
        share(p, B, in, qkv_.data() + offset, total, own, ready, member, members);
        offset += p.a.N;
      }
      barrier.wait();
      for (int64_t i; (i = next_.fetch_add(1)) < groups * most;)
        attend(l, now, i / most / kv_heads_, i / most % kv_heads_, i % most, own);
      barrier.wait();
      if (member == 0) next_ = 0;
      if (most > 1) {
        for (int64_t i = groups * member / members; i < groups * (member + 1) / members; ++i) {
          const Attention a = attention_of(l, now, i / kv_heads_, i % kv_heads_, nullptr);
          if (a.splits > 1) kernels().attention_decode->merge[cache_type_](a, 0, 1);
        }
        barrier.wait();
      }
      kernels().weight_only->widen[cache_type_](attended_.data(), normed, B * heads_ * D_);
      ready = 0;
      share(l.out[0], B, normed, delta_.data(), width_, own, ready, member, members);
      barrier.wait();
      if (!l.parallel) add_delta(l.after_attention);
      in = norm(l.feed_norm);
      ready = 0;
      const auto [begin, end] = share(l.gate[0], B, in, gated_.data(), feed_, own, ready, member, members);
      if (!l.up.empty()) share(l.up[0], B, in, hidden_.data(), feed_, own, ready, member, members);
      for (int64_t b = 0; b < B; ++b)
        kernel.activate(activation_, gated_.data() + b * feed_ + begin,
                        l.up.empty() ? nullptr : hidden_.data() + b * feed_ + begin, end - begin);
      if (l.parallel) add_delta(l.after_attention);
      barrier.wait();
      ready = 0;
      share(l.down[0], B, gated_.data(), delta_.data(), width_, own, ready, member, members);
      barrier.wait();
      add_delta(l.after_feed);
    }
    int64_t ready = 0;
    const auto [begin, end] = share(head_, B, norm(final_norm_), now.logits, head_.a.N, own, ready, member, members);
    if (logit_softcap_ > 0)
      for (int64_t b = 0; b < B; ++b)
        for (int64_t i = begin; i < end; ++i) {
          float& y = now.logits[b * head_.a.N + i];
          y = logit_softcap_ * std::tanh(y / logit_softcap_);
        }
  }

  const int64_t slots_, positions_, width_, heads_, kv_heads_, D_, rotated_, feed_;
  const int activation_;
  const Type cache_type_;
  const int64_t bytes_ = cache_type_ == kFloat ? 4 : 2;  // of a number in the cache
  const float scale_, softcap_, logit_softcap_, embedding_scale_;
  const Projection embedding_;
  const float* places_;  // learned positions [positions, width], or null
  const Normalise final_norm_;
  const Projection head_;
  std::vector<Layer> layers_;
  int64_t threads_, most_splits_;
  std::atomic<int64_t> next_{0};
  std::vector<float> qkv_, hidden_, gated_, delta_, parts_;
  std::vector<char> attended_;  // [B, heads, D] of the cache's type
  std::vector<double> lse_;
  std::vector<Own> own_;
};

}  // namespace

void bind_generation(py::module_& m) {
  py::class_<Decoder>(m, "Decoder", "One step of a described decoder; see fastllm/generation.py.")
      .def(py::init<const py::dict&>())
      .def("step", &Decoder::step,
           "step(B, tokens, lengths, slots, logits): addresses of int64, and for the logits of fp32 memory.");
}

}  // namespace fastllm::cpu
