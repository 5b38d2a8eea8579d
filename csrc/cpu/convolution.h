// What the local decoder's kernels share: rows of pixels in scratch, and convolutions of them.
//
// A row holds its pixels' channels side by side, so the values under a window of a few columns are
// adjacent, and those under the next pixel's window start one pixel further on. A convolution is
// then a product for every row of the window (a `Term`), whose left operand overlaps itself: one
// broadcast per pixel and one load per vector of outputs for a multiply-add of each pair of them.
// Vectors hold output channels, so nothing is summed across lanes, and any number of input channels
// is a contraction without padding.
//
// Included once per instruction set (see simd.h).
#pragma once

#include "../local_decoder.h"
#include "exponential.h"
#include "norm_rows.h"
#include "products.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

// Accumulators, the loaded vectors and a broadcast fill the registers: 32 of AVX-512, 16 of AVX2.
#if defined(__AVX512F__)
constexpr int kVecs = 4;  // of outputs at most
constexpr int kPixels[] = {0, 12, 12, 8, 6};
#elif defined(__AVX2__)
constexpr int kVecs = 3;
constexpr int kPixels[] = {0, 12, 6, 4};
#else
constexpr int kVecs = 1;
constexpr int kPixels[] = {0, 4};
#endif
constexpr int64_t kMostPixels = 12;

static inline int64_t ceil_to(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Numbers from one pixel to the next in a row of `channels`: whole elements.
template <class A>
static inline int64_t step_of(int64_t channels) {
  return ceil_to(channels, A::kFold);
}

// One row under the window. Lengths in elements of A.
struct Term {
  const void* row;      // what lies under the first pixel's window
  int64_t step;         // from one pixel to the next
  int64_t depth;        // under the window, adjacent
  const void* weights;  // of `pack_weights`
  bool restart;         // a new sum begins
};

// Sums of thousands of products are cut in shorter ones: the rounding error of a chain grows with
// its length, and PyTorch's convolutions cut theirs.
constexpr int64_t kChain = 320;

struct Terms {
  Term at[6];
  int count = 0;
  int begin = 0;      // a sum begins with this one
  int64_t chain = 0;  // steps of the sum so far

  template <class A>
  void add(const typename A::Scalar* row, int64_t step, int64_t columns, const void* weights) {
    const int64_t depth = columns * step / A::kFold;
    const bool restart = chain > 0 && (chain + depth > kChain || count == begin);
    chain = restart ? depth : chain + depth;
    at[count++] = {row, step / A::kFold, depth, weights, restart};
  }
};

// Numbers of one term's weights for `outputs`.
template <class A>
static inline int64_t weights_size(int64_t step, int64_t columns, int64_t outputs) {
  return columns * step * ceil_to(outputs, Vec::width);
}

// Weights of one term: value(column, channel, output), zero where a row or a vector has padding.
// In blocks of kVecs vectors of outputs, of them (depth, vectors).
template <class A, class Value>
static void pack_weights(int64_t step, int64_t columns, int64_t channels, int64_t outputs,
                         Value value, typename A::Scalar* out) {
  for (int64_t first = 0; first < outputs; first += kVecs * Vec::width) {
    const int64_t lanes = min_i64(ceil_to(outputs - first, Vec::width), kVecs * Vec::width);
    float group[kVecs * Vec::width * A::kFold];
    for (int64_t column = 0; column < columns; ++column)
      for (int64_t channel = 0; channel < step; channel += A::kFold, out += lanes * A::kFold) {
        for (int64_t lane = 0; lane < lanes; ++lane)
          for (int64_t f = 0; f < A::kFold; ++f) {
            const bool real = channel + f < channels && first + lane < outputs;
            group[lane * A::kFold + f] = real ? value(column, channel + f, first + lane) : 0.0f;
          }
        for (int64_t i = 0; i < lanes * A::kFold; i += Vec::width)
          Vec::load(group + i).store(out + i);
      }
  }
}

// V vectors of outputs from `first` on, for every pixel.
template <class A, int V, class Out>
__attribute__((noinline)) static void convolve_block(const Term* terms, int count_terms,
                                                     const float* start, int64_t start_step,
                                                     int64_t first, int64_t outputs, int64_t count,
                                                     Out* out) {
  using Element = typename A::Element;
  constexpr int P = kPixels[V];
  alignas(64) float sums[P * V * Vec::width];
  for (int64_t i = 0; i < count; i += P) {
    // What the products are added to comes last: beside a large bias they would lose their digits.
    const float* before = start + i * start_step + first;
    int64_t before_step = start_step;
    Vec acc[P][V];
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[p][v] = Vec::zero();
    for (int t = 0; t < count_terms; ++t) {
      if (terms[t].restart) {
#pragma GCC unroll 12
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            const Vec sum = Vec::load(before + p * before_step + v * Vec::width) + acc[p][v];
            sum.store(sums + (p * V + v) * Vec::width);
            acc[p][v] = Vec::zero();
          }
        before = sums;
        before_step = V * Vec::width;
      }
      const int64_t step = terms[t].step, depth = terms[t].depth;
      const Element* x = (const Element*)terms[t].row + i * step;
      const Element* w = (const Element*)terms[t].weights + first * depth;
      for (int64_t k = 0; k < depth; ++k, ++x, w += V * Vec::width) {
        typename A::Operand columns[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) columns[v] = A::load(w + v * Vec::width);
#pragma GCC unroll 12
        for (int p = 0; p < P; ++p) {
          const typename A::Operand one = A::fill(x[p * step]);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) acc[p][v] = A::multiply_add(columns[v], one, acc[p][v]);
        }
      }
    }
    Out* to = out + i * outputs + first;
    const int64_t pixels = count - i, lanes = outputs - first;
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p) {
      if (p >= pixels) break;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec sum = Vec::load(before + p * before_step + v * Vec::width) + acc[p][v];
        store_n(sum, to + p * outputs + v * Vec::width,
                min_i64(lanes - v * Vec::width, Vec::width));
      }
    }
  }
}

// out[i * outputs + o] = start[i * start_step + o] + the terms, for `count` pixels. Up to
// kMostPixels pixels behind the last one are computed too, and not stored: rows and `start` must be
// readable there, and `start` up to a whole vector of outputs.
template <class A, class Out>
static void convolve(const Term* terms, int count_terms, const float* start, int64_t start_step,
                     int64_t outputs, int64_t count, Out* out) {
  for (int64_t first = 0; first < outputs; first += kVecs * Vec::width) {
    const int64_t vecs = ceil_to(outputs - first, Vec::width) / Vec::width;
#define PIXELDIFF_BLOCK(V) \
  convolve_block<A, V>(terms, count_terms, start, start_step, first, outputs, count, out)
    if (vecs == 1)
      PIXELDIFF_BLOCK(1);
    else if (vecs >= kVecs)
      PIXELDIFF_BLOCK(kVecs);
#if defined(__AVX2__)
    else if (vecs == 2)
      PIXELDIFF_BLOCK(2);
    else
      PIXELDIFF_BLOCK(3);
#endif
#undef PIXELDIFF_BLOCK
  }
}

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// Values of From as a tensor of type To would hold them; storing them as Scalar may round as well.
template <class From, class To, class Scalar>
static inline Vec rounded(Vec a) {
  if constexpr (kSame<From, To> || kSame<To, float> || kSame<To, Scalar>) return a;
  To stored[Vec::width];
  a.store(stored);
  return Vec::load(stored);
}

// `count` pixels of an image row, rounded to To, to a row of `step` numbers a pixel.
template <class From, class To, class Scalar>
static void pack_pixels(const From* from, int64_t stride_w, int64_t stride_c, int64_t count,
                        int64_t channels, int64_t step, Scalar* out) {
  if (stride_c == 1 && stride_w == channels && step == channels) {
    for (int64_t i = 0; i < count * channels; i += Vec::width) {
      const int64_t n = min_i64(count * channels - i, Vec::width);
      store_n(rounded<From, To, Scalar>(load_n(from + i, n)), out + i, n);
    }
    return;
  }
  if (step != channels) memset(out, 0, (size_t)(count * step) * sizeof(Scalar));
  if (stride_c == 1) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < channels; c += Vec::width) {
        const int64_t n = min_i64(channels - c, Vec::width);
        store_n(rounded<From, To, Scalar>(load_n(from + i * stride_w + c, n)), out + i * step + c,
                n);
      }
    return;
  }
  // A vector of pixels of one channel at a time.
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < count; i += Vec::width) {
      const int64_t n = min_i64(count - i, Vec::width);
      const From* p = from + i * stride_w + c * stride_c;
      From gathered[Vec::width];
      if (stride_w != 1) {
        for (int64_t j = 0; j < n; ++j) gathered[j] = p[j * stride_w];
        p = gathered;
      }
      Scalar narrow[Vec::width];
      rounded<From, To, Scalar>(load_n(p, n)).store(narrow);
      for (int64_t j = 0; j < n; ++j) out[(i + j) * step + c] = narrow[j];
    }
}

// Columns [first, first + count) of row y of image b, rounded to To; zeros beyond the `width` it
// has.
template <class From, class To, class Scalar>
static void pack_row_of(const Pixels& image, int64_t b, int64_t y, int64_t first, int64_t count,
                        int64_t width, int64_t channels, int64_t step, Scalar* out) {
  const int64_t begin = first < 0 ? -first : 0, end = min_i64(count, width - first);
  memset(out, 0, (size_t)(begin * step) * sizeof(Scalar));
  memset(out + end * step, 0, (size_t)((count - end) * step) * sizeof(Scalar));
  pack_pixels<From, To>((const From*)image.data + b * image.stride_b + y * image.stride_h +
                            (first + begin) * image.stride_w,
                        image.stride_w, image.stride_c, end - begin, channels, step,
                        out + begin * step);
}

template <class Scalar>
using PackRow = void (*)(const Pixels&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                         int64_t, Scalar*);
template <class To, class Scalar>
static PackRow<Scalar> pack_row_from(DType dtype) {
  if (dtype == DType::f32) return pack_row_of<float, To, Scalar>;
  if (dtype == DType::bf16) return pack_row_of<bf16, To, Scalar>;
  return pack_row_of<f16, To, Scalar>;
}

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
