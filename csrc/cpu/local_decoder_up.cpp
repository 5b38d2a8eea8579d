// u = conv3x3(x doubled) + up_bias, y = silu(conv3x3([u, skip]) + bias)
//
// FLOPs: H*W * (B*Cu * (8*Ci + 18*Co) + S * 18*Cs*Co). Bytes: H*W * (B*Ci/4 + S*Cs + B*Co) *
// sizeof(x). In bf16, one image:
//
//   level        Ci, Cu, Cs -> Co     at      GFLOP   GB
//   4K, 0        16, 16, 16 -> 16     4096^2  189     1.21
//   4K, 0b       32, 32, 32 -> 16     2048^2  112     0.47
//   4K, 1        64, 64, 64 -> 32     1024^2  112     0.23
//   1K, 1        64, 64, 64 -> 64     1024^2  189     0.30
//
// Compute-bound on a CPU. On two idle Zen 5 cores, up to 64 channels, 0.95 to 2.6 times as fast as
// PyTorch's convolutions of the doubled x (bench/results/epyc-2core/kernels-l2p.json).
//
// A value of x meets several taps of the first convolution: 8 FLOPs are left of 18 once these are
// summed. The four results under a 2x2 window of x are one product of 4*Ci values with 4*Cu
// outputs. A strip of columns goes down the image in pairs of rows; u exists for four rows of the
// strip, in a ring, and is computed twice only in the column at either side. Images that share a
// skip are worked on two at a time, and its share of the second convolution is computed once for
// both.
//
// Sums, biases and SiLU are fp32, the taps are summed in fp32, and the result rounds once. Where
// bf16 is multiplied in hardware (AVX512-BF16) the summed taps and u are rounded to bf16, as
// PyTorch rounds u; elsewhere neither is. Compiled once per instruction set (see simd.h).
#include "local_decoder_up.h"

#include "convolution.h"
#include "strips.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

// The window of x at (i, j) holds rows i, i + 1 and columns j, j + 1 and gives u at rows 2i + 1,
// 2i + 2 and columns 2j + 1, 2j + 2. What u at 2i + 1 + phase sees of x at i + place:
struct Taps {
  int begin, end;
};
static inline Taps taps(int phase, int place) {
  if (phase == 0) return place == 0 ? Taps{0, 2} : Taps{2, 3};
  return place == 0 ? Taps{0, 1} : Taps{1, 3};
}

// A1 is the arithmetic of the first convolution, A2 of the second.
template <class A1, class A2>
struct Weights {
  const LocalDecoderUpArgs& a;
  const UpMemory& m;

  int64_t x_step() const { return step_of<A1>(a.Ci); }
  int64_t u_step() const { return step_of<A2>(a.Cu); }
  int64_t skip_step() const { return step_of<A2>(a.Cs); }
  // Both phases of the columns at once, as they are neighbours in a row of u.
  int64_t up_outputs() const { return 2 * u_step(); }

  typename A1::Scalar* up(int phase, int place) const {
    return (typename A1::Scalar*)m.up_weights +
           (2 * phase + place) * weights_size<A1>(x_step(), 2, up_outputs());
  }
  typename A2::Scalar* of_u(int r) const {
    return (typename A2::Scalar*)m.u_weights + r * weights_size<A2>(u_step(), 3, a.Co);
  }
  typename A2::Scalar* of_skip(int r) const {
    return (typename A2::Scalar*)m.s_weights + r * weights_size<A2>(skip_step(), 3, a.Co);
  }
};

template <class A1, class A2>
static void prepare(const LocalDecoderUpArgs& a, const UpMemory& m) {
  const Weights<A1, A2> w{a, m};
  const int64_t u_step = w.u_step();
  memcpy(m.bias, a.bias, (size_t)a.Co * sizeof(float));
  for (int phase = 0; phase < 2; ++phase)
    memcpy(m.up_bias + phase * u_step, a.up_bias, (size_t)a.Cu * sizeof(float));
  for (int phase = 0; phase < 2; ++phase)
    for (int place = 0; place < 2; ++place) {
      const Taps rows = taps(phase, place);
      pack_weights<A1>(
          w.x_step(), 2, a.Ci, w.up_outputs(),
          [&](int64_t column, int64_t channel, int64_t output) {
            const Taps columns = taps((int)(output / u_step), (int)column);
            output %= u_step;
            if (output >= a.Cu) return 0.0f;
            const float* window = a.up_weight + channel * 9 * a.Cu + output;
            float sum = 0;
            for (int r = rows.begin; r < rows.end; ++r)
              for (int c = columns.begin; c < columns.end; ++c) sum += window[(3 * r + c) * a.Cu];
            return sum;
          },
          w.up(phase, place));
    }
  for (int r = 0; r < 3; ++r) {
    const auto value = [&](int64_t column, int64_t channel, int64_t output) {
      return a.weight[((channel * 3 + r) * 3 + column) * a.Co + output];
    };
    pack_weights<A2>(u_step, 3, a.Cu, a.Co, value, w.of_u(r));
    pack_weights<A2>(
        w.skip_step(), 3, a.Cs, a.Co,
        [&](int64_t column, int64_t channel, int64_t output) {
          return value(column, a.Cu + channel, output);
        },
        w.of_skip(r));
  }
}

// A strip of columns of up to kUpTogether images that share a skip. Row buffers start one column to
// the left of the strip.
template <class A1, class A2, class T>
struct Strip {
  using S1 = typename A1::Scalar;
  using S2 = typename A2::Scalar;
  const LocalDecoderUpArgs& a;
  const UpMemory& m;
  const Weights<A1, A2> w;
  const int64_t s, image, together;  // skip s; images image, image + S, ...
  const int64_t left, pixels;

  S1* x(int64_t k, int64_t i) const { return (S1*)(m.x + (2 * k + (i & 1)) * m.x_row); }
  S2* u(int64_t k, int64_t y) const { return (S2*)(m.u + (4 * k + (y & 3)) * m.u_row); }
  S2* skip(int64_t y) const { return (S2*)(m.skip + (y & 3) * m.skip_row); }

  void pack_x(int64_t i) const {
    for (int64_t k = 0; k < together; ++k)
      pack_row_of<T, T>(a.x, image + k * a.S, i, left / 2 - 1, pixels / 2 + 2, a.W / 2, a.Ci,
                        w.x_step(), x(k, i));
  }

  // Row 2i + 1 + phase of u, from rows i and i + 1 of x. Outside the image u is zero, as padding.
  void raise(int64_t k, int64_t i, int phase) const {
    Terms terms;
    for (int place = 0; place < 2; ++place)
      if (i + place >= 0 && i + place < a.H / 2)
        terms.add<A1>(x(k, i + place), w.x_step(), 2, w.up(phase, place));
    S2* row = u(k, 2 * i + 1 + phase);
    convolve<A1>(terms.at, terms.count, m.up_bias, 0, w.up_outputs(), pixels / 2 + 1, row);
    const int64_t step = w.u_step();
    if (left == 0) memset(row, 0, (size_t)step * sizeof(S2));
    if (left + pixels == a.W) memset(row + (pixels + 1) * step, 0, (size_t)step * sizeof(S2));
  }
  void raise(int64_t i) const {
    for (int64_t k = 0; k < together; ++k)
      for (int phase = 0; phase < 2; ++phase)
        if (2 * i + 1 + phase >= 0 && 2 * i + 1 + phase < a.H) raise(k, i, phase);
  }

  template <class Row, class RowWeights>
  void add_rows(int64_t y, int64_t step, Row row, RowWeights weights, Terms& terms) const {
    for (int r = 0; r < 3; ++r)
      if (y + r - 1 >= 0 && y + r - 1 < a.H) terms.add<A2>(row(y + r - 1), step, 3, weights(r));
  }

  void join(int64_t y) const {
    // The share of the skip is a sum of its own, whether or not it serves more than one image.
    Terms beside;
    add_rows(
        y, w.skip_step(), [&](int64_t i) { return skip(i); }, [&](int r) { return w.of_skip(r); },
        beside);
    if (together > 1) convolve<A2>(beside.at, beside.count, m.bias, 0, a.Co, pixels, m.shared);
    for (int64_t k = 0; k < together; ++k) {
      Terms terms = beside;
      terms.begin = terms.count;
      add_rows(
          y, w.u_step(), [&](int64_t i) { return u(k, i); }, [&](int r) { return w.of_u(r); },
          terms);
      if (together > 1)
        convolve<A2>(terms.at + beside.count, terms.count - beside.count, m.shared, a.Co, a.Co,
                     pixels, m.line);
      else
        convolve<A2>(terms.at, terms.count, m.bias, 0, a.Co, pixels, m.line);
      T* out = (T*)a.y + (((image + k * a.S) * a.H + y) * a.W + left) * a.Co;
      const int64_t n = pixels * a.Co;
      for (int64_t i = 0; i < n; i += Vec::width)
        store_n(silu(Vec::load(m.line + i)), out + i, min_i64(n - i, Vec::width));
    }
  }

  // Pairs of rows [begin, end). A pair needs four rows of u and of the skip, in rings, of which
  // every next pair replaces two.
  void run(int64_t begin, int64_t end) const {
    if (begin > 0) pack_x(begin - 1);
    pack_x(begin);
    raise(begin - 1);
    int64_t next = begin > 0 ? 2 * begin - 1 : 0;
    for (int64_t pair = begin; pair < end; ++pair) {
      if (pair + 1 < a.H / 2) pack_x(pair + 1);
      raise(pair);
      for (; next <= min_i64(2 * pair + 2, a.H - 1); ++next)
        pack_row_of<T, T>(a.skip, s, next, left - 1, pixels + 2, a.W, a.Cs, w.skip_step(),
                          skip(next));
      join(2 * pair);
      join(2 * pair + 1);
    }
  }
};

template <class A1, class A2, class T>
static void strips(const LocalDecoderUpArgs& a, int64_t begin, int64_t end, const UpMemory& m) {
  const int64_t pairs = a.H / 2;
  const Strips split = strips_of(a.W, kUpPixels);
  while (begin < end) {
    const int64_t column = begin / pairs, first = begin % pairs;
    const int64_t count = min_i64(pairs - first, end - begin);
    const int64_t left = column % split.across * split.pixels, group = column / split.across;
    const int64_t s = group % a.S, image = s + group / a.S * kUpTogether * a.S;
    const int64_t together = min_i64((a.B - image + a.S - 1) / a.S, kUpTogether);
    const Strip<A1, A2, T> strip{a,     m,        {a, m}, s,
                                 image, together, left,   min_i64(a.W - left, split.pixels)};
    strip.run(first, first + count);
    begin += count;
  }
}

#if defined(__AVX512BF16__)
using OfBf16 = Bf16PairProducts;
#else
using OfBf16 = Fp32Products;
#endif

void local_decoder_up_prepare(const LocalDecoderUpArgs& a, const UpMemory& m) {
  if (a.dtype == DType::bf16)
    prepare<OfBf16, OfBf16>(a, m);
  else
    prepare<Fp32Products, Fp32Products>(a, m);
}

void local_decoder_up_strips(const LocalDecoderUpArgs& a, int64_t begin, int64_t end,
                             const UpMemory& m) {
  if (a.dtype == DType::f32) return strips<Fp32Products, Fp32Products, float>(a, begin, end, m);
  if (a.dtype == DType::bf16) return strips<OfBf16, OfBf16, bf16>(a, begin, end, m);
  strips<Fp32Products, Fp32Products, f16>(a, begin, end, m);
}

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
