// q and k: RMSNorm over each head, then every channel pair turned by its angle; v: copied. Text and
// image rows go into one (3, B, T + N, G, d) buffer, text first.
//
// Bytes: 6 * B*(T+N)*G*d * sizeof(qkv). FLOPs: 16 * B*(T+N)*G*d. Bandwidth-bound: a head's second
// pass finds it in the first-level cache, and the norm's weight is multiplied into the rotary
// table once per row, not once per head.
//
// fp32 inside, one rounding at the end. Compiled once per instruction set (see simd.h).
#include "qk_norm_rope.h"

#include "norm_rows.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

// A rotation with the norm's weight in it: y[i] = x[i] * own[i] + x[i ^ 1] * other[i]
struct Turn {
  float *own, *other;
};

// The weights of one norm, in their order and with the channels of each pair exchanged.
struct Weights {
  float *straight, *swapped;
};

static void widen_weights(const Vector& weight, int64_t d, Weights out) {
  widen_vector(weight, 0, d, out.straight);
  for (int64_t i = 0; i < d; ++i) out.swapped[i] = out.straight[i ^ 1];
}

// Spreads a row of the tables over the channels: (cos, cos), (-sin, sin).
static void spread(const float* cos, const float* sin, int64_t d, Turn out) {
  for (int64_t s = 0; s < d / 2; ++s) {
    out.own[2 * s] = cos[s];
    out.own[2 * s + 1] = cos[s];
    out.other[2 * s] = -sin[s];
    out.other[2 * s + 1] = sin[s];
  }
}

static void weigh(Turn angle, Weights weights, int64_t d, Turn out) {
  for (int64_t i = 0; i < d; ++i) {
    out.own[i] = angle.own[i] * weights.straight[i];
    out.other[i] = angle.other[i] * weights.swapped[i];
  }
}

template <class T>
static void norm_turn_head(const T* x, Turn turn, int64_t d, float eps, T* y) {
  constexpr int W = Vec::width;
  const Vec inverse = Vec::fill(inverse_rms(sum_of_squares(x, d), d, eps));
  for (int64_t i = 0; i < d; i += W) {  // W is even: a vector holds whole pairs
    const int64_t n = min_i64(d - i, W);
    const Vec h = load_n(x + i, n) * inverse;
    const Vec turned = swap_pairs(h) * load_n(turn.other + i, n);
    store_n(Vec::fma(h, load_n(turn.own + i, n), turned), y + i, n);
  }
}

template <class T>
static void rows(const QkNormRopeArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t d = a.d, width = a.G * d, total = a.text.rows + a.image.rows;
  const Turn angle{scratch, scratch + d};
  const Turn turns[2] = {{scratch + 2 * d, scratch + 3 * d}, {scratch + 4 * d, scratch + 5 * d}};
  const Weights weights[2] = {{scratch + 6 * d, scratch + 7 * d},
                              {scratch + 8 * d, scratch + 9 * d}};
  const QkNormRopeStream* prepared = nullptr;  // the stream whose weights are in scratch
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / total, place = row % total;
    const QkNormRopeStream& stream = place < a.text.rows ? a.text : a.image;
    const int64_t n = place < a.text.rows ? place : place - a.text.rows;
    if (&stream != prepared) {
      widen_weights(stream.q_weight, d, weights[0]);
      widen_weights(stream.k_weight, d, weights[1]);
      prepared = &stream;
    }
    spread(stream.cos + n * stream.cos_stride, stream.sin + n * stream.sin_stride, d, angle);
    const T* qkv = (const T*)stream.qkv.data + b * stream.qkv.stride_b + n * stream.qkv.stride_n;
    T* out = (T*)a.out + row * width;
    const int64_t part = a.B * total * width;
    for (int j = 0; j < 2; ++j) {
      weigh(angle, weights[j], d, turns[j]);
      for (int64_t g = 0; g < width; g += d)
        norm_turn_head(qkv + j * width + g, turns[j], d, a.eps, out + j * part + g);
    }
    memcpy(out + 2 * part, qkv + 2 * width, (size_t)width * sizeof(T));
  }
}

void qk_norm_rope_rows(const QkNormRopeArgs& a, int64_t begin, int64_t end, float* scratch) {
  if (a.dtype == DType::f32)
    rows<float>(a, begin, end, scratch);
  else if (a.dtype == DType::bf16)
    rows<bf16>(a, begin, end, scratch);
  else
    rows<f16>(a, begin, end, scratch);
}

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
