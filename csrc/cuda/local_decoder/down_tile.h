// Shared memory and the division of work of local_decoder_down, for rows of packed pixels in bf16
// or for planes of fp32.
#pragma once

#include "packed.h"
#include "products.h"

namespace pixeldiff::local_decoder {

template <bool planes, int channels>
struct DownTile {
  static constexpr bool kPlanes = planes;
  static constexpr int kChannels = channels;  // of the result
  // A block walks down a strip of squares, a row of them a step. A warp has 16, whose pixels in one
  // column are the rows of a product.
  static constexpr int kSquares = 16;
  static constexpr int kWarps = 4;
  static constexpr int kColumns = kWarps * kSquares;
  static constexpr int kThreads = 32 * kWarps;
  // Of a multiprocessor, as registers allow.
  static constexpr int kBlocks = channels == kOut ? 5 : 7;

  // A row of a strip, in one plane or three, as it lies in the image from the 16 bytes before the
  // strip's first pixel to the 16 behind its last. Behind a packed one are as many again: what
  // lanes read there does not count.
  static constexpr int kParts = planes ? 3 : 1;
  static constexpr int kPartSquareBytes = planes ? 8 : kSquareBytes;
  static constexpr int kPieces = kColumns * kPartSquareBytes / 16 + 2;
  static constexpr uint32_t kPartBytes = 16 * (kPieces + !planes);
  static constexpr uint32_t kRowBytes = kParts * kPartBytes;
  // A stage is two rows: the lower ones of a row of squares and the upper ones of the next.
  static constexpr uint32_t kStageBytes = 2 * kRowBytes;
  // One is read, three are on their way: at 8192, where a block reads 1.6 KB a step, 24 KB of a
  // multiprocessor, six times what 1.4 us of latency take of its share of the memory.
  static constexpr int kStages = 4;
  static constexpr int kAhead = kStages - 1;

  PIXELDIFF_HOST_DEVICE static constexpr uint32_t stage(int step) {
    return (step & (kStages - 1)) * kStageBytes;
  }
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t row(int i) { return i * kRowBytes; }
  // Of planes: the pixel before a square's first, of a channel.
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t plane_at(int square, int channel) {
    return channel * kPartBytes + 16 + square * kPartSquareBytes - 4;
  }

  // Which of a row's nine values, 3 tap + channel, the k-th of a product is; negative or beyond:
  // none. Of planes each lane has one channel, the last lane none.
  PIXELDIFF_HOST_DEVICE static constexpr int value(int k) {
    if (!planes) return packed_value(1, k);
    const int channel = k % 8 / 2, tap = k % 2 + k / 8 * 2;
    return channel < 3 && tap < 3 ? 3 * tap + channel : -1;
  }

  // Copies of 16 bytes, numbered. Thread t makes those whose number is t modulo the threads.
  static constexpr int kAll = 2 * kParts * kPieces;
  static constexpr int kCopies = (kAll + kThreads - 1) / kThreads;
  struct Copy {
    int row, part, piece;
    uint32_t to;
  };
  PIXELDIFF_HOST_DEVICE static constexpr Copy copy(int i) {
    const int line = i / kPieces, piece = i % kPieces;
    return {line / kParts, line % kParts, piece, line * kPartBytes + 16 * piece};
  }
  // Whether there is an i-th copy, a thread's k-th, without asking where all threads have one.
  PIXELDIFF_HOST_DEVICE static constexpr bool is_copy(int k, int i) {
    return (k + 1) * kThreads <= kAll || i < kAll;
  }

  static constexpr uint32_t kAlignment = 128;  // all banks
  static constexpr uint32_t kSharedBytes = kStages * kStageBytes;
  static_assert(kAlignment + kSharedBytes <= 48 * 1024, "what a launch may ask for by itself");
};

}  // namespace pixeldiff::local_decoder
