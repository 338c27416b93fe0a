// Which instruction set the CPU kernels run: chosen once at run time, forced by PYFT_CPU_TARGET or by a test.
#pragma once

#include <string>
#include <vector>

namespace pyft {

enum class CpuTarget { baseline = 0, avx2 = 1, avx512 = 2 };

// The target in force. Throws std::runtime_error when PYFT_CPU_TARGET names one that is unknown or that this CPU lacks.
CpuTarget cpu_target();

// Force a target by name; "auto" returns to the choice made from PYFT_CPU_TARGET and the CPU. Throws as above.
void set_cpu_target(const std::string& name);

const char* cpu_target_name(CpuTarget target);

// Names of the targets that this CPU runs, slowest first.
std::vector<std::string> supported_cpu_targets();

}  // namespace pyft

// One always-inline loop body is compiled once per instruction set through these attributes.
#if defined(__x86_64__) && defined(__GNUC__)
#define PYFT_X86_TARGETS 1
#if defined(__clang__)
#define PYFT_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define PYFT_TARGET_AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq")))
#else
#define PYFT_TARGET_AVX2 __attribute__((target("avx2,fma,prefer-vector-width=256")))
#define PYFT_TARGET_AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,prefer-vector-width=512")))
#endif
#else
#define PYFT_X86_TARGETS 0
#endif
