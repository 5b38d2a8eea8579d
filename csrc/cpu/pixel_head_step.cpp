// The head and the student sampler's update in one pass, from the pixels of each patch to the next
// state: x0 = x - t v, then x_next = (1 - t') x0 + t' noise, or x + (t' - t) v, or x0 at t' = 0.
//
// Bytes: B*H*W * (p * sizeof(q) + 4*C * arrays), arrays = x, x_next, and noise and x0 where there
// are any. FLOPs: B*H*W * (p * (2*C + 4) + 6*C). Bandwidth-bound; apart the update takes 7 to 9
// passes over the image, some in fp64.
//
// v as in pixel_head. The update rounds where the sampler's own operations do, one by one, so that
// the result is bitwise theirs: this file must be compiled without contraction to multiply-add.
// Compiled once per instruction set (see simd.h).
#include "pixel_head_step.h"

#include "pixel_head_tile.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

constexpr double kMinTime = 0.05;  // MIN_TIME of pixeldiff/ops/pixel_head_step.py

// The arithmetic of x0 (and of the velocity, where the network predicts x0) in S, as PyTorch rounds
// it: scalars to the type of the tensor they meet, every operation for itself.
template <class S>
static void update(const PixelHeadStepArgs& a, const float* v, int64_t offset, int64_t n) {
  const float* x = a.x + offset;
  float* x_next = a.x_next + offset;
  float x0[Vec::width], velocity[Vec::width];
  const S t = (S)a.t, divisor = (S)(a.t > kMinTime ? a.t : kMinTime);
  for (int64_t i = 0; i < n; ++i) x0[i] = a.predicts_x0 ? v[i] : (float)((S)x[i] - t * (S)v[i]);
  if (a.x0 != nullptr) memcpy(a.x0 + offset, x0, (size_t)n * sizeof(float));
  if (a.t_next == 0) {
    memcpy(x_next, x0, (size_t)n * sizeof(float));
  } else if (!a.ode) {
    const float keep = (float)(1 - a.t_next), add = (float)a.t_next;
    const float* noise = a.noise + offset;
    for (int64_t i = 0; i < n; ++i) x_next[i] = keep * x0[i] + add * noise[i];
  } else {
    const float move = (float)(a.t_next - a.t);
    for (int64_t i = 0; i < n; ++i)
      velocity[i] = a.predicts_x0 ? (float)(((S)x[i] - (S)x0[i]) / divisor) : v[i];
    for (int64_t i = 0; i < n; ++i) x_next[i] = x[i] + move * velocity[i];
  }
}

template <int C, class T>
static void patches(const PixelHeadStepArgs& a, int64_t begin, int64_t end) {
  for_colours<C, T>(a.head, begin, end, [&](Vec v, int64_t offset, int64_t n) {
    float lanes[Vec::width];
    v.store(lanes);
    if (a.fp64_state)
      update<double>(a, lanes, offset, n);
    else
      update<float>(a, lanes, offset, n);
  });
}

void pixel_head_step_patches(const PixelHeadStepArgs& a, int64_t begin, int64_t end) {
  PIXELDIFF_FOR_TILES(patches, a.head.dtype, a.head.p, a, begin, end)
}

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
