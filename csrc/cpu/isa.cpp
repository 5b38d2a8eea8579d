#include "isa.h"

namespace pixeldiff::cpu {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

bool isa_compiled(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16:
#ifdef PIXELDIFF_HAVE_AVX512_BF16
      return true;
#else
      return false;
#endif
    case Isa::avx512:
#ifdef PIXELDIFF_HAVE_AVX512
      return true;
#else
      return false;
#endif
    case Isa::avx2:
#ifdef PIXELDIFF_HAVE_AVX2
      return true;
#else
      return false;
#endif
    default:
      return true;
  }
}

bool isa_usable(Isa isa) {
  if (!isa_compiled(isa)) return false;
#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
  // These builtins also ask the operating system whether it saves the wide registers.
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return has_avx2;
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx512) return has_avx512;
#ifdef PIXELDIFF_HAVE_AVX512_BF16  // older compilers do not know the name
  if (isa == Isa::avx512_bf16) return has_avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#endif
  return isa == Isa::portable;
}

Isa best_isa() {
  if (isa_usable(Isa::avx512_bf16)) return Isa::avx512_bf16;
  if (isa_usable(Isa::avx512)) return Isa::avx512;
  if (isa_usable(Isa::avx2)) return Isa::avx2;
  return Isa::portable;
}

}  // namespace pixeldiff::cpu
