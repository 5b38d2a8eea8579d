// y = x + sigmoid(x weight^T + lq_logit) * feature, with one logit a token or one a channel.
//
// Per token: 3 * B*N*D * sizeof(x) bytes, 4 * B*N*D FLOPs; the second pass over a row of x finds it
// in the first-level cache. Per channel the product x weight^T comes from a GEMM and this is the
// pass over its output: 5 * B*N*D * sizeof(x) bytes, about 25 * B*N*D FLOPs. Bandwidth-bound.
//
// fp32 inside, one rounding at the end. Compiled once per instruction set (see simd.h).
#include "sigma_gate.h"

#include "exponential.h"
#include "norm_rows.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

template <class T>
static const T* row_of(const Rows& rows, int64_t b, int64_t n) {
  return (const T*)rows.data + b * rows.stride_b + n * rows.stride_n;
}

template <class T>
static float dot(const T* x, const float* weight, int64_t D) {
  constexpr int W = Vec::width;
  Vec a = Vec::zero(), b = Vec::zero(), c = Vec::zero(), d = Vec::zero();
  int64_t i = 0;
  for (; i + 4 * W <= D; i += 4 * W) {  // four chains hide the latency of the multiply-add
    a = Vec::fma(Vec::load(x + i), Vec::load(weight + i), a);
    b = Vec::fma(Vec::load(x + i + W), Vec::load(weight + i + W), b);
    c = Vec::fma(Vec::load(x + i + 2 * W), Vec::load(weight + i + 2 * W), c);
    d = Vec::fma(Vec::load(x + i + 3 * W), Vec::load(weight + i + 3 * W), d);
  }
  for (; i < D; i += W) {
    const int64_t n = min_i64(D - i, W);
    a = Vec::fma(load_n(x + i, n), load_n(weight + i, n), a);
  }
  return sum_lanes((a + b) + (c + d));
}

// The same for every row, whichever worker has it: the gate is one lane of a vector sigmoid.
template <class L>
static Vec gate_of_token(float product, const L* lq_logit) {
  float logit[Vec::width];
  (load_tail(lq_logit, 1) + Vec::fill(product)).store(logit);
  return sigmoid(Vec::fill(logit[0]));
}

template <class T, class L>
static void per_token(const SigmaGatePerTokenArgs& a, int64_t begin, int64_t end, float* weight) {
  constexpr int W = Vec::width;
  widen_vector(a.weight, 0, a.D, weight);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.N, n = row % a.N;
    const T* x = row_of<T>(a.x, b, n);
    const T* feature = row_of<T>(a.feature, b, n);
    T* y = (T*)a.y + row * a.D;
    const Vec gate = gate_of_token(dot(x, weight, a.D), row_of<L>(a.lq_logit, b, n));
    int64_t i = 0;
    for (; i + W <= a.D; i += W)
      Vec::fma(gate, Vec::load(feature + i), Vec::load(x + i)).store(y + i);
    if (i < a.D) {
      const int64_t rest = a.D - i;
      store_tail(Vec::fma(gate, load_tail(feature + i, rest), load_tail(x + i, rest)), y + i, rest);
    }
  }
}

template <class T, class L>
static void per_channel(const SigmaGatePerChannelArgs& a, int64_t begin, int64_t end) {
  constexpr int W = Vec::width;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.N, n = row % a.N;
    const T* x = row_of<T>(a.x, b, n);
    const T* feature = row_of<T>(a.feature, b, n);
    const T* product = row_of<T>(a.product, b, n);
    const L* lq_logit = row_of<L>(a.lq_logit, b, n);
    T* y = (T*)a.y + row * a.D;
    int64_t i = 0;
    for (; i + W <= a.D; i += W) {
      const Vec gate = sigmoid(Vec::load(product + i) + Vec::load(lq_logit + i));
      Vec::fma(gate, Vec::load(feature + i), Vec::load(x + i)).store(y + i);
    }
    if (i < a.D) {
      const int64_t rest = a.D - i;
      const Vec gate = sigmoid(load_tail(product + i, rest) + load_tail(lq_logit + i, rest));
      store_tail(Vec::fma(gate, load_tail(feature + i, rest), load_tail(x + i, rest)), y + i, rest);
    }
  }
}

void sigma_gate_per_token_rows(const SigmaGatePerTokenArgs& a, int64_t begin, int64_t end,
                               float* scratch) {
  const bool wide = a.logit_dtype == DType::f32;
  if (a.dtype == DType::f32)
    per_token<float, float>(a, begin, end, scratch);
  else if (a.dtype == DType::bf16)
    wide ? per_token<bf16, float>(a, begin, end, scratch)
         : per_token<bf16, bf16>(a, begin, end, scratch);
  else
    wide ? per_token<f16, float>(a, begin, end, scratch)
         : per_token<f16, f16>(a, begin, end, scratch);
}

void sigma_gate_per_channel_rows(const SigmaGatePerChannelArgs& a, int64_t begin, int64_t end,
                                 float*) {
  const bool wide = a.logit_dtype == DType::f32;
  if (a.dtype == DType::f32)
    per_channel<float, float>(a, begin, end);
  else if (a.dtype == DType::bf16)
    wide ? per_channel<bf16, float>(a, begin, end) : per_channel<bf16, bf16>(a, begin, end);
  else
    wide ? per_channel<f16, float>(a, begin, end) : per_channel<f16, f16>(a, begin, end);
}

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
