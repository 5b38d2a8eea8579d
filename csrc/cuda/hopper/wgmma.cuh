// wgmma.mma_async in the shapes that attention needs: D += A B with fp32 accumulators.
#pragma once

#include "host_device.h"

namespace pixeldiff::hopper {

// clang-format off
#define PIXELDIFF_8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                          "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define PIXELDIFF_32(d) PIXELDIFF_8(d, 0), PIXELDIFF_8(d, 8), PIXELDIFF_8(d, 16), PIXELDIFF_8(d, 24)
#define PIXELDIFF_40(d) PIXELDIFF_32(d), PIXELDIFF_8(d, 32)
#define PIXELDIFF_64(d) PIXELDIFF_40(d), PIXELDIFF_8(d, 40), PIXELDIFF_8(d, 48), PIXELDIFF_8(d, 56)
#define PIXELDIFF_NAMES_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                           "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, " \
                           "%30, %31"
#define PIXELDIFF_NAMES_40 PIXELDIFF_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define PIXELDIFF_NAMES_64 PIXELDIFF_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
                           "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// clang-format on

// A and B in shared memory, both with K side by side. Without `add`, D is overwritten.
#define PIXELDIFF_SHARED(type)                                                             \
  asm volatile(                                                                            \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"                                     \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" PIXELDIFF_NAMES_64 \
      "}, %64, %65, add, 1, 1, 0, 0;\n}\n"                                                 \
      : PIXELDIFF_64(d)                                                                    \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))

// A in registers; B in shared memory with N side by side. Always added.
#define PIXELDIFF_REGISTERS(type, n, regs, a0, a1, a2, a3, at)                        \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type         \
               " {" PIXELDIFF_NAMES_##regs "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " at \
                                           ", 1, 1, 1, 1;\n"                          \
               : PIXELDIFF_##regs(d)                                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <bool kBf16>
__device__ __forceinline__ void wgmma_shared(float (&d)[64], uint64_t a, uint64_t b, bool add) {
  if constexpr (kBf16)
    PIXELDIFF_SHARED("bf16");
  else
    PIXELDIFF_SHARED("f16");
}

template <bool kBf16>
__device__ __forceinline__ void wgmma_registers(float (&d)[32], const uint32_t* a, uint64_t b) {
  if constexpr (kBf16)
    PIXELDIFF_REGISTERS("bf16", "64", 32, "%32", "%33", "%34", "%35", "%36");
  else
    PIXELDIFF_REGISTERS("f16", "64", 32, "%32", "%33", "%34", "%35", "%36");
}
template <bool kBf16>
__device__ __forceinline__ void wgmma_registers(float (&d)[40], const uint32_t* a, uint64_t b) {
  if constexpr (kBf16)
    PIXELDIFF_REGISTERS("bf16", "80", 40, "%40", "%41", "%42", "%43", "%44");
  else
    PIXELDIFF_REGISTERS("f16", "80", 40, "%40", "%41", "%42", "%43", "%44");
}
template <bool kBf16>
__device__ __forceinline__ void wgmma_registers(float (&d)[64], const uint32_t* a, uint64_t b) {
  if constexpr (kBf16)
    PIXELDIFF_REGISTERS("bf16", "128", 64, "%64", "%65", "%66", "%67", "%68");
  else
    PIXELDIFF_REGISTERS("f16", "128", 64, "%64", "%65", "%66", "%67", "%68");
}

// e4m3: 32 of K to a product, which lies side by side in all operands. Without `add`, D is
// overwritten.
__device__ __forceinline__ void wgmma_shared_e4m3(float (&d)[64], uint64_t a, uint64_t b,
                                                  bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" PIXELDIFF_NAMES_64
      "}, %64, %65, add, 1, 1;\n}\n"
      : PIXELDIFF_64(d)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

#define PIXELDIFF_REGISTERS_E4M3(n, regs, a0, a1, a2, a3, at, flag)                   \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " flag                           \
               ", 0;\n"                                                               \
               "wgmma.mma_async.sync.aligned.m64n" n                                  \
               "k32.f32.e4m3.e4m3"                                                    \
               " {" PIXELDIFF_NAMES_##regs "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " at \
                                           ", add, 1, 1;\n}\n"                        \
               : PIXELDIFF_##regs(d)                                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))

__device__ __forceinline__ void wgmma_registers_e4m3(float (&d)[32], const uint32_t* a, uint64_t b,
                                                     bool add) {
  PIXELDIFF_REGISTERS_E4M3("64", 32, "%32", "%33", "%34", "%35", "%36", "%37");
}
__device__ __forceinline__ void wgmma_registers_e4m3(float (&d)[40], const uint32_t* a, uint64_t b,
                                                     bool add) {
  PIXELDIFF_REGISTERS_E4M3("80", 40, "%40", "%41", "%42", "%43", "%44", "%45");
}

#undef PIXELDIFF_REGISTERS_E4M3
#undef PIXELDIFF_REGISTERS
#undef PIXELDIFF_SHARED
#undef PIXELDIFF_NAMES_64
#undef PIXELDIFF_NAMES_40
#undef PIXELDIFF_NAMES_32
#undef PIXELDIFF_64
#undef PIXELDIFF_40
#undef PIXELDIFF_32
#undef PIXELDIFF_8

}  // namespace pixeldiff::hopper
