// Choice among the variants of a kernel: PIXELDIFF_VARIANT(isa, name) is the address of
// portable::name, avx2::name or avx512::name, of those that were compiled.
#pragma once

#include "isa.h"

namespace pixeldiff::cpu {

template <class Function>
Function variant(Isa isa, Function portable, Function avx2, Function avx512) {
  if (isa == Isa::avx512) return avx512;
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
#define PIXELDIFF_VARIANT(isa, name) \
  variant(isa, &portable::name, &PIXELDIFF_AVX2(name), &PIXELDIFF_AVX512(name))

}  // namespace pixeldiff::cpu
