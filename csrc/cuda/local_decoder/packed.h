// Pixels of three channels in bf16, 6 bytes each, as they lie in the image: what a product sums
// over is not a tap's channels but the nine values of three taps in a row, which are neighbours in
// memory, in words of 4 bytes that ldmatrix could not name.
#pragma once

#include "../hopper/host_device.h"

namespace pixeldiff::local_decoder {

constexpr int kPackedChannels = 3;
constexpr int kSquareBytes = 2 * kPackedChannels * 2;  // two pixels in a row

// Which of the nine values of a row of packed taps, 3 tap + channel, the k-th of a product of
// pixels of column parity b is; negative or beyond: none. Words of 4 bytes start at every other
// value: the first value of a pixel in an even column is the second of its word.
PIXELDIFF_HOST_DEVICE constexpr int packed_value(int b, int k) { return k - (1 - b); }

// Of a square's pixel of column parity b, in a row that starts 16 bytes before square 0: the word
// in which its first tap starts.
PIXELDIFF_HOST_DEVICE constexpr int packed_at(int square, int b) {
  return 16 + square * kSquareBytes + (b - 1) * (2 * kPackedChannels) - 2 * (1 - b);
}

// A of the nine values around every other one of 32 pixels, from where this lane's first word is.
// The last two are words of only the first of four lanes. What else is in them must not count, not
// even as a NaN times zero.
template <class M>
PIXELDIFF_DEVICE void load_packed(M& m, uint32_t from, int b, int lane, uint32_t (&to)[4]) {
  const bool first = lane % 4 == 0;
  PIXELDIFF_UNROLL
  for (int half = 0; half < 2; ++half) {
    const uint32_t at = from + half * 8 * kSquareBytes;
    const uint32_t low = m.get_word(at), high = m.get_word(at + 16);
    to[half] = first && b == 0 ? low & 0xffff0000 : low;
    to[2 + half] = first ? (b == 0 ? high : high & 0xffff) : 0;
  }
}

// The same of pixels in even columns in the order of those in odd ones, for the same weights: from
// the middle of this lane's first word on, so that a word is made of two.
template <class M>
PIXELDIFF_DEVICE void load_between(M& m, uint32_t from, int lane, uint32_t (&to)[4]) {
  PIXELDIFF_UNROLL
  for (int half = 0; half < 2; ++half) {
    const uint32_t at = from - 2 + half * 8 * kSquareBytes;
    to[half] = m.get_word(at) >> 16 | m.get_word(at + 4) << 16;
    to[2 + half] = lane % 4 == 0 ? m.get_word(at + 16) >> 16 : 0;
  }
}

}  // namespace pixeldiff::local_decoder
