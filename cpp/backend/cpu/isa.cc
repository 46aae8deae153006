#include "backend/cpu/isa.h"

#include <cstdlib>

#include "fastllm/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastllm::cpu {

namespace isa_base {
Kernels table();
}
namespace isa_avx2 {
Kernels table();
}
namespace isa_avx512 {
Kernels table();
Kernels table_bf16();
}  // namespace isa_avx512
namespace isa_amx {
Kernels table();
}

namespace {

#if defined(FASTLLM_WITH_AMX)
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if ((d & kBf16) == 0 || (d & kTile) == 0) return false;
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
#if defined(__x86_64__)
  __builtin_cpu_init();
  [[maybe_unused]] const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                       __builtin_cpu_supports("avx512vl");
#if defined(FASTLLM_WITH_AMX)
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vnni") && has_amx())
    names.emplace_back("amx");
#endif
#if defined(FASTLLM_WITH_AVX512)
  if (avx512 && __builtin_cpu_supports("avx512bf16")) names.emplace_back("avx512_bf16");
  if (avx512) names.emplace_back("avx512");
#endif
#if defined(FASTLLM_WITH_AVX2)
  if (avx2) names.emplace_back("avx2");
#endif
#endif
  names.emplace_back("base");
  return names;
}

Kernels select_kernels(const std::string& isa) {
  const auto names = available_isas();
  std::string wanted = isa;
  if (wanted.empty()) {
    const char* env = std::getenv("FASTLLM_CPU_ISA");
    wanted = env && *env ? env : names.front();
  }
  std::string list;
  for (const auto& name : names) {
    list += (list.empty() ? "" : ", ") + name;
    if (name != wanted) continue;
#if defined(FASTLLM_WITH_AMX)
    if (name == "amx") return isa_amx::table();
#endif
#if defined(FASTLLM_WITH_AVX512)
    if (name == "avx512_bf16") return isa_avx512::table_bf16();
    if (name == "avx512") return isa_avx512::table();
#endif
#if defined(FASTLLM_WITH_AVX2)
    if (name == "avx2") return isa_avx2::table();
#endif
    return isa_base::table();
  }
  throw InvalidArgument("CPU instruction set '" + wanted + "' is not available here; choose one of: " + list);
}

}  // namespace fastllm::cpu
