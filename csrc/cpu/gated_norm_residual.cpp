// r = x + gate * y * rsqrt(mean(y^2) + eps) * weight
//
// Bytes: 3 * B*N*D * sizeof(x) + B*D * sizeof(gate). FLOPs: 6 * B*N*D. Bandwidth-bound; a row of y
// is still in the first-level cache when it is read the second time.
//
// fp32 inside, one rounding at the end. Compiled once per instruction set (see simd.h).
#include "gated_norm_residual.h"

#include "norm_rows.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

// gain = weight * gate, so that the second pass is one multiply-add per element.
static void prepare_gain(const GatedNormResidualArgs& a, int64_t b, float* gain, float* scratch) {
  widen_vector(a.weight, b, a.D, gain);
  if (a.gate.data == nullptr) return;
  widen_vector(a.gate, b, a.D, scratch);
  for (int64_t i = 0; i < a.D; ++i) gain[i] *= scratch[i];
}

template <class T>
static void rows(const GatedNormResidualArgs& a, int64_t begin, int64_t end, float* scratch) {
  float* gain = scratch;
  int64_t prepared = -1;  // the image whose gain is in scratch
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.N, n = row % a.N;
    if (b != prepared) {
      prepare_gain(a, b, gain, scratch + a.D);
      prepared = b;
    }
    const T* x = (const T*)a.x.data + b * a.x.stride_b + n * a.x.stride_n;
    const T* y = (const T*)a.y.data + b * a.y.stride_b + n * a.y.stride_n;
    const float inverse = inverse_rms(sum_of_squares(y, a.D), a.D, a.eps);
    normalise_row(y, inverse, gain, x, a.D, (T*)a.r + row * a.D);
  }
}

void gated_norm_residual_rows(const GatedNormResidualArgs& a, int64_t begin, int64_t end,
                              float* scratch) {
  if (a.dtype == DType::f32)
    rows<float>(a, begin, end, scratch);
  else if (a.dtype == DType::bf16)
    rows<bf16>(a, begin, end, scratch);
  else
    rows<f16>(a, begin, end, scratch);
}

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
