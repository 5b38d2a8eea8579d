// From the chunks of pixel_adaln_mlp to its result, in registers.
//
// A warp's sums are 2 x 16 patches of 2 pixels. Channels lie as the A operand of mma.sync wants
// them and hidden values too (hopper/fragment.h), so that both products of the MLP take them from
// the registers they are in.
#pragma once

#include <cmath>

#include "gelu.h"
#include "pixels.h"
#include "schedule.h"

namespace pixeldiff::pixel_adaln {

template <bool kBf16>
struct Mlp {
  using Tile = Sm90Tile<PairColumns<2, 4, 128>, 2>;
  enum Chunk { kGate1, kShift, kScale, kGate2 };

  int rows, pixels, hidden;  // hidden a multiple of 16
  Pixels q, a;               // the stream, and the expanded attention
  const void* ada_bias;      // (6*16*pixels,)
  const void* norm_weight;   // (16,)
  const void* fc1_weight;    // (hidden, 16) contiguous
  const void* fc1_bias;      // (hidden,)
  const void* fc2_weight;    // (16, hidden) contiguous
  const void* fc2_bias;      // (16,)
  void* out;                 // (rows, pixels, 16) contiguous
  float eps;

  // Of each part, pixel, row and half: asked for before the product, which hides the way to memory.
  struct Given {
    uint32_t q[2][Tile::kPixels][2][2], a[2][Tile::kPixels][2][2];
  };

  template <class M>
  PIXELDIFF_DEVICE Given load(const M& m, const Schedule::Tile& at) const {
    const Place place = Place::of(m, at.row);
    Given given;
    PIXELDIFF_UNROLL
    for (int i = 0; i < 8 * Tile::kPixels; ++i) {
      const int part = i / (4 * Tile::kPixels), x = i / 4 % Tile::kPixels, r = i / 2 % 2,
                half = i % 2;
      const int row = place.row(part, r), pixel = at.pixel + x, channel = place.channel(half);
      given.q[part][x][r][half] = load_pixel(m, q, rows, pixels, row, pixel, channel);
      given.a[part][x][r][half] = load_pixel(m, a, rows, pixels, row, pixel, channel);
    }
    return given;
  }

  template <class M>
  PIXELDIFF_DEVICE void store(M& m, const Schedule::Tile& at, const Given& given,
                              const float (&sums)[2][Tile::kColumns / 2]) const {
    const Place place = Place::of(m, at.row);
    PIXELDIFF_UNROLL
    for (int x = 0; x < Tile::kPixels; ++x) {
      uint32_t stream[2][2][2];  // q + gate1 * a, rounded
      uint32_t h[2][4];          // the norm's result, an A operand
      modulate(m, place, at.pixel + x, x, given, sums, stream, h);
      float y[2][2][4] = {};
      multiply(m, place, h, y);
      finish(m, place, at.pixel + x, x, sums, stream, y);
    }
  }

 private:
  template <class M>
  PIXELDIFF_DEVICE static void unpack(const M& m, uint32_t pair, float (&x)[2]) {
    m.template unpack<kBf16>(pair, x[0], x[1]);
  }
  // The bias of a chunk's two channels.
  template <class M>
  PIXELDIFF_DEVICE void bias_of(const M& m, const Place& place, int pixel, Chunk chunk, int half,
                                float (&bias)[2]) const {
    const int row = Tile::weight_row(at_most(pixel, pixels - 1)) + chunk * kChannels;
    unpack(m, load_pair(m, ada_bias, row + place.channel(half)), bias);
  }

  template <class M>
  PIXELDIFF_DEVICE void modulate(M& m, const Place& place, int pixel, int x, const Given& given,
                                 const float (&sums)[2][Tile::kColumns / 2],
                                 uint32_t (&stream)[2][2][2], uint32_t (&h)[2][4]) const {
    float norm[2][2], gate[2][2], shift[2][2], scale[2][2];  // half, side
    PIXELDIFF_UNROLL
    for (int half = 0; half < 2; ++half) {
      unpack(m, load_pair(m, norm_weight, place.channel(half)), norm[half]);
      bias_of(m, place, pixel, kGate1, half, gate[half]);
      bias_of(m, place, pixel, kShift, half, shift[half]);
      bias_of(m, place, pixel, kScale, half, scale[half]);
    }
    PIXELDIFF_UNROLL
    for (int part = 0; part < 2; ++part) {
      PIXELDIFF_UNROLL
      for (int r = 0; r < 2; ++r) {
        float values[2][2], squares = 0.0f;
        PIXELDIFF_UNROLL
        for (int half = 0; half < 2; ++half) {
          const auto chunk = [&](Chunk c, int side) {
            return sums[part][Tile::value(x, c, half, r, side)];
          };
          float before[2], attention[2];
          unpack(m, given.q[part][x][r][half], before);
          unpack(m, given.a[part][x][r][half], attention);
          uint32_t& kept = stream[part][r][half];
          kept = m.template pack<kBf16>(
              fmaf(chunk(kGate1, 0) + gate[half][0], attention[0], before[0]),
              fmaf(chunk(kGate1, 1) + gate[half][1], attention[1], before[1]));
          unpack(m, kept, values[half]);
          squares = fmaf(values[half][0], values[half][0], squares);
          squares = fmaf(values[half][1], values[half][1], squares);
        }
        // The other channels of a pixel are in the quad's other lanes.
        squares += m.shuffle_xor(squares, 1);
        squares += m.shuffle_xor(squares, 2);
        const float inverse = m.rsqrt(fmaf(squares, 1.0f / kChannels, eps));
        PIXELDIFF_UNROLL
        for (int half = 0; half < 2; ++half) {
          float result[2];
          PIXELDIFF_UNROLL
          for (int side = 0; side < 2; ++side) {
            const float s = sums[part][Tile::value(x, kScale, half, r, side)] + scale[half][side];
            const float t = sums[part][Tile::value(x, kShift, half, r, side)] + shift[half][side];
            const float gain = norm[half][side] * (1.0f + s);
            result[side] = fmaf(values[half][side] * inverse, gain, t);
          }
          h[part][2 * half + r] = m.template pack<kBf16>(result[0], result[1]);
        }
      }
    }
  }

  // y = fc2 gelu(fc1 h), without fc2's bias, 16 hidden values at a time.
  template <class M>
  PIXELDIFF_DEVICE void multiply(M& m, const Place& place, const uint32_t (&h)[2][4],
                                 float (&y)[2][2][4]) const {
    const int n = hopper::operand_column(place.lane);
    for (int f = 0; f < hidden; f += 16) {
      uint32_t fc1[2][2], fc2[2][2];  // B operands: half of N, half of K
      float bias[2][2];
      PIXELDIFF_UNROLL
      for (int half = 0; half < 2; ++half) {
        PIXELDIFF_UNROLL
        for (int k = 0; k < 2; ++k) {
          const int at = place.channel(k);
          fc1[half][k] = load_pair(m, fc1_weight, (f + 8 * half + n) * kChannels + at);
          fc2[half][k] = load_pair(m, fc2_weight, (8 * half + n) * hidden + f + at);
        }
        unpack(m, load_pair(m, fc1_bias, f + place.channel(half)), bias[half]);
      }
      PIXELDIFF_UNROLL
      for (int part = 0; part < 2; ++part) {
        uint32_t active[4];
        PIXELDIFF_UNROLL
        for (int half = 0; half < 2; ++half) {
          float z[4] = {bias[half][0], bias[half][1], bias[half][0], bias[half][1]};
          m.template multiply<kBf16>(z, h[part], fc1[half][0], fc1[half][1]);
          PIXELDIFF_UNROLL
          for (int r = 0; r < 2; ++r)
            active[2 * half + r] = m.template pack<kBf16>(gelu(m, z[2 * r]), gelu(m, z[2 * r + 1]));
        }
        PIXELDIFF_UNROLL
        for (int half = 0; half < 2; ++half)
          m.template multiply<kBf16>(y[part][half], active, fc2[half][0], fc2[half][1]);
      }
    }
  }

  template <class M>
  PIXELDIFF_DEVICE void finish(M& m, const Place& place, int pixel, int x,
                               const float (&sums)[2][Tile::kColumns / 2],
                               const uint32_t (&stream)[2][2][2], const float (&y)[2][2][4]) const {
    PIXELDIFF_UNROLL
    for (int half = 0; half < 2; ++half) {
      float gate[2], bias[2];
      bias_of(m, place, pixel, kGate2, half, gate);
      unpack(m, load_pair(m, fc2_bias, place.channel(half)), bias);
      PIXELDIFF_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int part = i / 2, r = i % 2, row = place.row(part, r);
        if (row >= rows || pixel >= pixels) continue;
        float kept[2], result[2];
        unpack(m, stream[part][r][half], kept);
        PIXELDIFF_UNROLL
        for (int side = 0; side < 2; ++side)
          result[side] = fmaf(sums[part][Tile::value(x, kGate2, half, r, side)] + gate[side],
                              y[part][half][2 * r + side] + bias[side], kept[side]);
        const int64_t to = (static_cast<int64_t>(row) * pixels + pixel) * kChannels;
        m.store(static_cast<char*>(out) + 2 * (to + place.channel(half)),
                m.template pack<kBf16>(result[0], result[1]));
      }
    }
  }
};

}  // namespace pixeldiff::pixel_adaln
