// x_new = x + gate * y, then h = x_new * rsqrt(mean(x_new^2) + eps) * weight * (1 + scale) + shift.
//
// Bytes: 4 * B*N*D * sizeof(x) + 3 * B*D * sizeof(scale). FLOPs: 7 * B*N*D. Bandwidth-bound; two
// separate ops would read x_new back from memory, five passes instead of four.
//
// fp32 inside. x_new is rounded once, and the norm reads the rounded value, as the next op of an
// unfused network would. Compiled once per instruction set (see simd.h).
#include "gated_residual_norm.h"

#include "norm_rows.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

// out = x + gate * y rounded to T; returns nothing, the rounded row is read back by the norm.
template <class T>
static void add_gated(const T* x, const T* y, const float* gate, int64_t D, T* out) {
  for (int64_t i = 0; i < D; i += Vec::width) {
    const int64_t n = min_i64(D - i, Vec::width);
    store_n(Vec::fma(load_n(gate + i, n), load_n(y + i, n), load_n(x + i, n)), out + i, n);
  }
}

template <class T>
static void rows(const GatedResidualNormArgs& a, int64_t begin, int64_t end, float* scratch) {
  float* gain = scratch;
  float* shift = scratch + a.D;
  float* gate = scratch + 2 * a.D;
  int64_t prepared = -1;  // the image whose factors are in scratch
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.N, n = row % a.N;
    if (b != prepared) {
      prepare_gain(a.weight, a.scale, b, a.D, gain, scratch + 3 * a.D);
      widen_vector(a.shift, b, a.D, shift);
      widen_vector(a.gate, b, a.D, gate);
      prepared = b;
    }
    const T* x = (const T*)a.x.data + b * a.x.stride_b + n * a.x.stride_n;
    const T* y = (const T*)a.y.data + b * a.y.stride_b + n * a.y.stride_n;
    T* x_new = (T*)a.x_new + row * a.D;
    add_gated(x, y, gate, a.D, x_new);
    const float inverse = inverse_rms(sum_of_squares(x_new, a.D), a.D, a.eps);
    normalise_row(x_new, inverse, gain, shift, a.D, (T*)a.h + row * a.D);
  }
}

void gated_residual_norm_rows(const GatedResidualNormArgs& a, int64_t begin, int64_t end,
                              float* scratch) {
  if (a.dtype == DType::f32)
    rows<float>(a, begin, end, scratch);
  else if (a.dtype == DType::bf16)
    rows<bf16>(a, begin, end, scratch);
  else
    rows<f16>(a, begin, end, scratch);
}

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
