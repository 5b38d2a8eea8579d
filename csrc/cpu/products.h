// Operands of products: fp32, or pairs of bf16 where the processor multiplies those in hardware.
// Included once per instruction set (see simd.h).
#pragma once

#include "simd.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

// An element is one number.
struct Fp32Products {
  static constexpr int64_t kFold = 1;  // steps of the contraction per element
  using Scalar = float;
  using Element = float;
  using Operand = Vec;

  static Operand load(const Element* p) { return Vec::load(p); }
  static Operand fill(Element a) { return Vec::fill(a); }
  static Vec multiply_add(Operand a, Operand b, Vec c) { return Vec::fma(a, b, c); }
};

#if defined(__AVX512BF16__)
// An element holds two consecutive steps of the contraction. Their products are exact and summed
// in fp32.
struct Bf16PairProducts {
  static constexpr int64_t kFold = 2;
  using Scalar = bf16;
  using Element = uint32_t;
  using Operand = __m512i;

  static Operand load(const Element* p) { return _mm512_loadu_si512(p); }
  static Operand fill(Element a) { return _mm512_set1_epi32((int)a); }
  static Vec multiply_add(Operand a, Operand b, Vec c) {
    return {_mm512_dpbf16_ps(c.v, (__m512bh)a, (__m512bh)b)};
  }
};
#endif

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
