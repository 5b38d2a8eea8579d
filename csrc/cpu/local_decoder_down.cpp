// skip = silu(conv3x3(x) + bias), pooled = the maximum of each 2x2 square of skip
//
// FLOPs: 18 * B*H*W*Ci*Co. Bytes: B*H*W * (Ci * sizeof(x) + 1.25 * Co * sizeof(skip)). In bf16,
// from an fp32 image at full resolution:
//
//   level        Ci -> Co   at      GFLOP   GB
//   4K, 0        3 -> 16    4096^2  14.5    0.87
//   4K, 0b       16 -> 32   2048^2  38.7    0.47
//   4K, 1        32 -> 64   1024^2  38.7    0.23
//   1K, 1        3 -> 64    1024^2  3.6     0.18
//
// Compute-bound at a core's 10 GB/s but for the image's own level, where SiLU costs as much as the
// products. On two idle Zen 5 cores 0.96 to 2.0 times as fast as PyTorch's convolution, SiLU and
// pool, 0.8 to 1.1 times as fast as these under torch.compile
// (bench/results/epyc-2core/kernels-l2p.json).
//
// A strip of columns goes down the image in pairs of rows. What is in scratch, four rows of x and
// two of the result, stays in the second-level cache; skip and pooled are written once. Sums, bias
// and SiLU are fp32; the result rounds once. x is rounded to the weight's type when it is packed.
// Compiled once per instruction set (see simd.h).
#include "local_decoder_down.h"

#include "convolution.h"
#include "strips.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

// Row r of the window meets row y + r - 1 of x.
template <class A>
static inline typename A::Scalar* row_weights(const LocalDecoderDownArgs& a, const DownMemory& m,
                                              int r) {
  return (typename A::Scalar*)m.weights + r * weights_size<A>(step_of<A>(a.Ci), 3, a.Co);
}

template <class A>
static void prepare(const LocalDecoderDownArgs& a, const DownMemory& m) {
  memcpy(m.bias, a.bias, (size_t)a.Co * sizeof(float));
  for (int r = 0; r < 3; ++r)
    pack_weights<A>(
        step_of<A>(a.Ci), 3, a.Ci, a.Co,
        [&](int64_t column, int64_t channel, int64_t output) {
          return a.weight[((channel * 3 + r) * 3 + column) * a.Co + output];
        },
        row_weights<A>(a, m, r));
}

// line = silu(line), and so out, as stored
template <class T>
static inline void activate(float* line, int64_t n, T* out) {
  for (int64_t i = 0; i < n; i += Vec::width) {
    const Vec y = silu(Vec::load(line + i));
    y.store(line + i);
    store_n(y, out + i, min_i64(n - i, Vec::width));
  }
}

// The maximum of two rows and of neighbouring pixels.
template <class T>
static inline void pool(const float* above, const float* below, int64_t pixels, int64_t channels,
                        T* out) {
  for (int64_t j = 0; j < pixels / 2; ++j, above += 2 * channels, below += 2 * channels)
    for (int64_t c = 0; c < channels; c += Vec::width) {
      const Vec left = max_or_nan(Vec::load(above + c), Vec::load(below + c));
      const Vec right =
          max_or_nan(Vec::load(above + channels + c), Vec::load(below + channels + c));
      store_n(max_or_nan(left, right), out + j * channels + c, min_i64(channels - c, Vec::width));
    }
}

// Pairs of rows [begin, end) of at most `most` columns from `left` on. The four rows of x that a
// pair needs are in a ring, of which every next pair replaces two.
template <class A, class T>
static void strip(const LocalDecoderDownArgs& a, int64_t b, int64_t left, int64_t most,
                  int64_t begin, int64_t end, const DownMemory& m) {
  using Scalar = typename A::Scalar;
  const int64_t pixels = min_i64(a.W - left, most), step = step_of<A>(a.Ci);
  const auto pack_row = pack_row_from<T, Scalar>(a.x_dtype);
  const auto row = [&](int64_t y) { return (Scalar*)(m.rows + (y & 3) * m.row); };
  int64_t next = begin > 0 ? 2 * begin - 1 : 0;
  for (int64_t pair = begin; pair < end; ++pair) {
    for (; next <= min_i64(2 * pair + 2, a.H - 1); ++next)
      pack_row(a.x, b, next, left - 1, pixels + 2, a.W, a.Ci, step, row(next));
    for (int j = 0; j < 2; ++j) {
      const int64_t y = 2 * pair + j;
      Terms terms;
      for (int r = 0; r < 3; ++r)
        if (y + r - 1 >= 0 && y + r - 1 < a.H)
          terms.add<A>(row(y + r - 1), step, 3, row_weights<A>(a, m, r));
      convolve<A>(terms.at, terms.count, m.bias, 0, a.Co, pixels, m.line[j]);
      activate(m.line[j], pixels * a.Co, (T*)a.skip + ((b * a.H + y) * a.W + left) * a.Co);
    }
    pool(m.line[0], m.line[1], pixels, a.Co,
         (T*)a.pooled + ((b * a.H / 2 + pair) * a.W / 2 + left / 2) * a.Co);
  }
}

template <class A, class T>
static void strips(const LocalDecoderDownArgs& a, int64_t begin, int64_t end, const DownMemory& m) {
  const int64_t pairs = a.H / 2;
  const Strips split = strips_of(a.W, kDownPixels);
  while (begin < end) {
    const int64_t column = begin / pairs, first = begin % pairs;
    const int64_t count = min_i64(pairs - first, end - begin);
    strip<A, T>(a, column / split.across, column % split.across * split.pixels, split.pixels, first,
                first + count, m);
    begin += count;
  }
}

#if defined(__AVX512BF16__)
using OfBf16 = Bf16PairProducts;
#else
using OfBf16 = Fp32Products;
#endif

void local_decoder_down_prepare(const LocalDecoderDownArgs& a, const DownMemory& m) {
  if (a.dtype == DType::bf16)
    prepare<OfBf16>(a, m);
  else
    prepare<Fp32Products>(a, m);
}

void local_decoder_down_strips(const LocalDecoderDownArgs& a, int64_t begin, int64_t end,
                               const DownMemory& m) {
  if (a.dtype == DType::f32) return strips<Fp32Products, float>(a, begin, end, m);
  if (a.dtype == DType::bf16) return strips<OfBf16, bf16>(a, begin, end, m);
  strips<Fp32Products, f16>(a, begin, end, m);
}

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
