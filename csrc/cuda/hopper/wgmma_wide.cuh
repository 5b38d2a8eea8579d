// wgmma.mma_async in the shapes of a tile of a whole matrix product: 216 and 256 columns, both
// operands in shared memory with K side by side. Without `add`, D is overwritten.
#pragma once

#include "host_device.h"

namespace pixeldiff::hopper {

// clang-format off
#define PIXELDIFF_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PIXELDIFF_8(d, i) PIXELDIFF_4(d, i), PIXELDIFF_4(d, i + 4)
#define PIXELDIFF_32(d, i) PIXELDIFF_8(d, i), PIXELDIFF_8(d, i + 8), PIXELDIFF_8(d, i + 16), \
                           PIXELDIFF_8(d, i + 24)
#define PIXELDIFF_96(d) PIXELDIFF_32(d, 0), PIXELDIFF_32(d, 32), PIXELDIFF_32(d, 64)
#define PIXELDIFF_108(d) PIXELDIFF_96(d), PIXELDIFF_8(d, 96), PIXELDIFF_4(d, 104)
#define PIXELDIFF_128(d) PIXELDIFF_96(d), PIXELDIFF_32(d, 96)
#define PIXELDIFF_NAMES_108 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, " \
  "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, " \
  "%66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, " \
  "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107"
#define PIXELDIFF_NAMES_128 PIXELDIFF_NAMES_108 ", " \
  "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, " \
  "%122, %123, %124, %125, %126, %127"
// clang-format on

#define PIXELDIFF_SHARED(type, n, regs, at_a, at_b, at_add)                               \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " at_add                             \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type       \
               " {" PIXELDIFF_NAMES_##regs "}, " at_a ", " at_b ", add, 1, 1, 0, 0;\n}\n" \
               : PIXELDIFF_##regs(d)                                                      \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)))

template <bool kBf16>
__device__ __forceinline__ void wgmma_shared(float (&d)[108], uint64_t a, uint64_t b, bool add) {
  if constexpr (kBf16)
    PIXELDIFF_SHARED("bf16", "216", 108, "%108", "%109", "%110");
  else
    PIXELDIFF_SHARED("f16", "216", 108, "%108", "%109", "%110");
}
template <bool kBf16>
__device__ __forceinline__ void wgmma_shared(float (&d)[128], uint64_t a, uint64_t b, bool add) {
  if constexpr (kBf16)
    PIXELDIFF_SHARED("bf16", "256", 128, "%128", "%129", "%130");
  else
    PIXELDIFF_SHARED("f16", "256", 128, "%128", "%129", "%130");
}

#undef PIXELDIFF_SHARED
#undef PIXELDIFF_NAMES_128
#undef PIXELDIFF_NAMES_108
#undef PIXELDIFF_128
#undef PIXELDIFF_108
#undef PIXELDIFF_96
#undef PIXELDIFF_32
#undef PIXELDIFF_8
#undef PIXELDIFF_4

}  // namespace pixeldiff::hopper
