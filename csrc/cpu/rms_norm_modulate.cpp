// y = x * rsqrt(mean(x^2) + eps) * weight * (1 + scale) + shift, row by row.
//
// Bytes: 2 * B*N*D * sizeof(x) + 2 * B*D * sizeof(scale). FLOPs: 5 * B*N*D. Bandwidth-bound: the
// second pass over a row finds it in the first-level cache.
//
// fp32 inside, one rounding at the end. Compiled once per instruction set (see simd.h).
#include "rms_norm_modulate.h"

#include "norm_rows.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

template <class T>
static void rows(const RmsNormModulateArgs& a, int64_t begin, int64_t end, float* scratch) {
  float* gain = scratch;
  float* shift = scratch + a.D;
  int64_t prepared = -1;  // the image whose factors are in scratch
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.N, n = row % a.N;
    if (b != prepared) {
      prepare_gain(a.weight, a.scale, b, a.D, gain, scratch + 2 * a.D);
      widen_vector(a.shift, b, a.D, shift);
      prepared = b;
    }
    const T* x = (const T*)a.x.data + b * a.x.stride_b + n * a.x.stride_n;
    const float inverse = inverse_rms(sum_of_squares(x, a.D), a.D, a.eps);
    normalise_row(x, inverse, gain, shift, a.D, (T*)a.y + row * a.D);
  }
}

void rms_norm_modulate_rows(const RmsNormModulateArgs& a, int64_t begin, int64_t end,
                            float* scratch) {
  if (a.dtype == DType::f32)
    rows<float>(a, begin, end, scratch);
  else if (a.dtype == DType::bf16)
    rows<bf16>(a, begin, end, scratch);
  else
    rows<f16>(a, begin, end, scratch);
}

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
