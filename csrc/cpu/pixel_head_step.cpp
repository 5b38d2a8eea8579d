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
static void update(const PixelHeadStepArgs& a, Vec output, int64_t offset, int64_t n) {
  constexpr int W = Vec::width;  // loops of a fixed length vectorise; lanes beyond n are idle
  float v[W], x[W], x0[W], next[W];
  output.store(v);
  load_n(a.x + offset, n).store(x);
  const S t = (S)a.t, divisor = (S)(a.t > kMinTime ? a.t : kMinTime);
  if (a.predicts_x0)
    output.store(x0);
  else
    for (int i = 0; i < W; ++i) x0[i] = (float)((S)x[i] - t * (S)v[i]);
  if (a.x0 != nullptr) store_n(Vec::load(x0), a.x0 + offset, n);
  if (a.t_next == 0) {
    store_n(Vec::load(x0), a.x_next + offset, n);
    return;
  }
  if (!a.ode) {
    const float keep = (float)(1 - a.t_next), add = (float)a.t_next;
    float noise[W];
    load_n(a.noise + offset, n).store(noise);
    for (int i = 0; i < W; ++i) next[i] = keep * x0[i] + add * noise[i];
  } else {
    const float move = (float)(a.t_next - a.t);
    if (a.predicts_x0)
      for (int i = 0; i < W; ++i) v[i] = (float)(((S)x[i] - (S)x0[i]) / divisor);
    for (int i = 0; i < W; ++i) next[i] = x[i] + move * v[i];
  }
  store_n(Vec::load(next), a.x_next + offset, n);
}

template <int C, class T>
static void patches(const PixelHeadStepArgs& a, int64_t begin, int64_t end) {
  for_colours<C, T>(a.head, begin, end, [&](Vec v, int64_t offset, int64_t n) {
    if (a.fp64_state)
      update<double>(a, v, offset, n);
    else
      update<float>(a, v, offset, n);
  });
}

void pixel_head_step_patches(const PixelHeadStepArgs& a, int64_t begin, int64_t end) {
  PIXELDIFF_FOR_TILES(patches, a.head.dtype, a.head.p, a, begin, end)
}

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
