// Picks one instruction set's tables of kernels: the widest that this CPU runs, or the one asked for by name.
#include "cpu/dispatch.h"

#include <string.h>

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
const Kernels kCompiled[] = {FASTLLM_ISAS};  // TABLES(...) of what setup.py builds, narrowest first
std::atomic<const Kernels*> selected_table{nullptr};

// A table whose null entries are the narrower one's: tables are arrays of pointers to functions and nothing else.
template <class Table>
const Table* completed(const Table* wide, const Table* narrow) {
  using Kernel = void (*)();
  constexpr size_t kEntries = sizeof(Table) / sizeof(Kernel);
  static_assert(sizeof(Table) % sizeof(Kernel) == 0, "a table has an entry that is no function pointer");
  Kernel entries[kEntries], others[kEntries];
  memcpy(entries, wide, sizeof(Table));
  memcpy(others, narrow, sizeof(Table));
  for (size_t i = 0; i < kEntries; ++i)
    if (!entries[i]) entries[i] = others[i];
  Table* table = new Table;
  memcpy(table, entries, sizeof(Table));
  return table;
}

// What was compiled, each instruction set completed by the ones before it; made once and kept.
const std::vector<Kernels>& built() {
  static const std::vector<Kernels>& all = *[] {
    auto* found = new std::vector<Kernels>;
    for (Kernels tables : kCompiled) {
#define COMPLETE(op, type, isa) tables.op = completed(tables.op, found->back().op);
      if (!found->empty()) {
        FASTLLM_OPS(COMPLETE, )
      }
#undef COMPLETE
      found->push_back(tables);
    }
    return found;
  }();
  return all;
}

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
  for (const Kernels& table : built())
    if (runs_here(table.name)) names.push_back(table.name);
  return names;
}

void select(const std::string& name) {
  const Kernels* choice = nullptr;
  std::string choices;
  for (const Kernels& table : built()) {
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
