// Picks the variant of a kernel for an instruction set: PIXELDIFF_VARIANT(isa, rows_function).
#pragma once

#include "isa.h"

namespace pixeldiff::cpu {

// Most kernels gain nothing from AVX512-BF16 and have no variant of their own for it.
template <class Function>
Function variant(Isa isa, Function portable, Function avx2, Function avx512) {
  if (isa == Isa::avx512 || isa == Isa::avx512_bf16) return avx512;
  return isa == Isa::avx2 ? avx2 : portable;
}

#ifdef PIXELDIFF_HAVE_AVX2
#define PIXELDIFF_AVX2(name) avx2::name
#else
#define PIXELDIFF_AVX2(name) portable::name
#endif
#ifdef PIXELDIFF_HAVE_AVX512
#define PIXELDIFF_AVX512(name) avx512::name
#else
#define PIXELDIFF_AVX512(name) portable::name
#endif
#ifdef PIXELDIFF_HAVE_AVX512_BF16
#define PIXELDIFF_AVX512_BF16(name) avx512_bf16::name
#else
#define PIXELDIFF_AVX512_BF16(name) PIXELDIFF_AVX512(name)
#endif
#define PIXELDIFF_VARIANT(isa, name) \
  variant(isa, &portable::name, &PIXELDIFF_AVX2(name), &PIXELDIFF_AVX512(name))

}  // namespace pixeldiff::cpu
