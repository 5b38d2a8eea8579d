// The weights of local_decoder_up as its kernel multiplies by them, and where they lie.
//
// Between the two convolutions is no activation, so that as far as u goes they are one. A pixel of
// the result is one of a square of 2 x 2, and which of them, (a, b), is its parity. It is a 3x3
// convolution of the x around its square, (ey, ex) of which are -1 to 1 here. u is zero outside the
// image. Row 2a of the second convolution's taps is what then falls away at the edge above or
// below, and the same of columns; a pixel of parity a is at no other edge. Only taps of the
// square's own row of x change by that: what else the missing row of u is made of is outside too.
#pragma once

#include "../hopper/host_device.h"
#include "packed.h"
#include "products.h"

namespace pixeldiff::local_decoder {

constexpr int kParities = 4;    // 2 a + b
constexpr int kMaxMiddle = 32;  // channels of u

// A tap of x: at which edges, and where.
struct Slot {
  bool edge_y, edge_x;
  int ey, ex;
};
// Those of the inside, then those that are different in the first (a = 0) or last row, column, and
// both.
constexpr int kSlots = 16;
PIXELDIFF_HOST_DEVICE constexpr int inner_slot(int ey, int ex) { return 3 * ey + ex + 4; }
PIXELDIFF_HOST_DEVICE constexpr int row_slot(int ex) { return 10 + ex; }
PIXELDIFF_HOST_DEVICE constexpr int column_slot(bool edge_y, int ey) {
  return edge_y && ey == 0 ? 15 : 13 + ey;
}
PIXELDIFF_HOST_DEVICE constexpr Slot slot(int i) {
  if (i < 9) return {false, false, i / 3 - 1, i % 3 - 1};
  if (i < 12) return {true, false, 0, i - 10};
  if (i < 15) return {false, true, i - 13, 0};
  return {true, true, 0, 0};
}

// Whether tap r of the second convolution meets a row of u that exists.
PIXELDIFF_HOST_DEVICE constexpr bool kept(bool edge, int a, int r) { return !edge || r != 2 * a; }
// Whether, through that tap, tap t of the first one meets row e of x: row a + r - 1 of u reads the
// doubled row a + r + t - 2, and two of those are one of x.
PIXELDIFF_HOST_DEVICE constexpr bool meets(int a, int r, int t, int e) {
  return (a + r + t) / 2 - 1 == e;
}

// Bytes from the workspace's start.
struct Weights {
  int x_blocks, skip_blocks;  // of 16 channels; of skip 0 where it is packed

  PIXELDIFF_HOST_DEVICE constexpr int x(int parity, int slot, int block) const {
    return ((parity * kSlots + slot) * x_blocks + block) * kFragmentBytes;
  }
  PIXELDIFF_HOST_DEVICE constexpr int skip(int tap, int block) const {
    return x(kParities, 0, 0) + (tap * skip_blocks + block) * kFragmentBytes;
  }
  // Of a row of packed taps, for pixels of column parity b.
  PIXELDIFF_HOST_DEVICE constexpr int packed(int b, int row) const {
    return x(kParities, 0, 0) + (3 * b + row) * kFragmentBytes;
  }
  PIXELDIFF_HOST_DEVICE constexpr int skip_fragments() const {
    return skip_blocks == 0 ? 6 : 9 * skip_blocks;
  }
  // The sum of both biases, 16 of fp32.
  PIXELDIFF_HOST_DEVICE constexpr int shift(int parity, bool edge_y, bool edge_x) const {
    return x(kParities, 0, 0) + skip_fragments() * kFragmentBytes +
           (parity * 4 + edge_y * 2 + edge_x) * kOut * 4;
  }
  PIXELDIFF_HOST_DEVICE constexpr int bytes() const { return shift(kParities, false, false); }
};
PIXELDIFF_HOST_DEVICE constexpr Weights weights_of(int64_t Ci, int64_t Cs) {
  return {static_cast<int>((Ci + kBlock - 1) / kBlock),
          Cs == kPackedChannels ? 0 : static_cast<int>((Cs + kBlock - 1) / kBlock)};
}

}  // namespace pixeldiff::local_decoder
