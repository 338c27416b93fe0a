#include "cpu_target.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace pyft {
namespace {

constexpr int kUnset = -1;
std::atomic<int> forced{kUnset};

CpuTarget best_target() {
#if PYFT_X86_TARGETS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq")) {
    return CpuTarget::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return CpuTarget::avx2;
  }
#endif
  return CpuTarget::baseline;
}

std::string names_of_supported() {
  std::string names = "auto";
  for (const std::string& name : supported_cpu_targets()) {
    names += ", " + name;
  }
  return names;
}

CpuTarget target_by_name(const std::string& name, const char* argument) {
  for (CpuTarget target : {CpuTarget::baseline, CpuTarget::avx2, CpuTarget::avx512}) {
    if (name == cpu_target_name(target)) {
      if (target > best_target()) {
        throw std::runtime_error(std::string(argument) + "=" + name +
                                 ": this CPU does not have these instructions; it runs " + names_of_supported());
      }
      return target;
    }
  }
  throw std::runtime_error(std::string(argument) + " must be one of " + names_of_supported() + ", got '" + name + "'");
}

CpuTarget default_target() {
  const char* name = std::getenv("PYFT_CPU_TARGET");
  if (name == nullptr || *name == '\0' || std::string(name) == "auto") {
    return best_target();
  }
  return target_by_name(name, "PYFT_CPU_TARGET");
}

}  // namespace

CpuTarget cpu_target() {
  const int target = forced.load(std::memory_order_relaxed);
  if (target != kUnset) {
    return static_cast<CpuTarget>(target);
  }
  static const CpuTarget chosen = default_target();
  return chosen;
}

void set_cpu_target(const std::string& name) {
  forced = name == "auto" ? kUnset : static_cast<int>(target_by_name(name, "cpu_target"));
}

const char* cpu_target_name(CpuTarget target) {
  switch (target) {
    case CpuTarget::avx512:
      return "avx512";
    case CpuTarget::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

std::vector<std::string> supported_cpu_targets() {
  std::vector<std::string> names;
  for (int target = 0; target <= static_cast<int>(best_target()); ++target) {
    names.emplace_back(cpu_target_name(static_cast<CpuTarget>(target)));
  }
  return names;
}

}  // namespace pyft
