// Picks one instruction set's tables of kernels: the widest that this CPU runs, or the one asked for by name.
#include "cpu/dispatch.h"

#include <atomic>
#include <stdexcept>

#include "cpu/table.h"

namespace fastllm {

#define DECLARE_TABLE(op, type, isa) extern const type op##_##isa;
FASTLLM_OPS(DECLARE_TABLE, scalar)
FASTLLM_OPS(DECLARE_TABLE, avx2)
FASTLLM_OPS(DECLARE_TABLE, avx512)
FASTLLM_OPS(DECLARE_TABLE, avx512_bf16)

namespace {

#define TABLE_ADDRESS(op, type, isa) &op##_##isa,
#define TABLES(isa) {#isa, FASTLLM_OPS(TABLE_ADDRESS, isa)}
const Kernels kBuilt[] = {FASTLLM_ISAS};  // TABLES(...) of what setup.py builds, narrowest first
std::atomic<const Kernels*> selected_table{nullptr};

bool runs_here(const std::string& name) {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (name == "avx2") return avx2;
  if (name == "avx512") return avx512;
  // Every CPU with AVX512_BF16 has VNNI too, which this table uses: asked for, should one appear that has not.
  if (name == "avx512_bf16")
    return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
  return name == "scalar";
}

}  // namespace

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const Kernels& table : kBuilt)
    if (runs_here(table.name)) names.push_back(table.name);
  return names;
}

void select(const std::string& name) {
  const Kernels* choice = nullptr;
  std::string choices;
  for (const Kernels& table : kBuilt) {
    if (!runs_here(table.name)) continue;
    choices += (choices.empty() ? "" : ", ") + std::string(table.name);
    if (name.empty() || name == table.name) choice = &table;
  }
  if (!choice)
    throw std::invalid_argument("FASTLLM_CPU: expected one of " + choices +
                                " (what this CPU and this build have), got '" + name + "'");
  selected_table = choice;
}

std::string selected() { return kernels().name; }

const Kernels& kernels() {
  if (!selected_table) select("");
  return *selected_table;
}

}  // namespace fastllm
