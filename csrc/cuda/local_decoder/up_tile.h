// Shared memory and the division of work of local_decoder_up, for x and skip of so many blocks of
// 16 channels; 0 of skip are three channels, packed.
#pragma once

#include "../ampere/rows.h"

namespace pixeldiff::local_decoder {

template <int x_blocks, int skip_blocks>
struct UpTile {
  static constexpr int kXBlocks = x_blocks, kSkipBlocks = skip_blocks;
  static constexpr bool kPacked = skip_blocks == 0;
  // A block walks down a strip of squares of the result, a row of them a step. A warp has one
  // parity of 16 of them: the rows of its products.
  static constexpr int kSquares = 16;
  static constexpr int kGroups = 1;
  static constexpr int kColumns = kGroups * kSquares;
  static constexpr int kWarps = 4 * kGroups;
  static constexpr int kThreads = 32 * kWarps;
  // Registers hold all weights: 36 for each block of 16 channels, 12 for three packed ones.
  static constexpr int kBlocks =  // of a multiprocessor
      x_blocks + skip_blocks > 2 || x_blocks == 2 ? 2 : 4 - skip_blocks;
  // Products that a row of skip takes: of so many taps and blocks.
  static constexpr int kSkipTaps = kPacked ? 1 : 3, kTapBlocks = kPacked ? 1 : skip_blocks;

  using SkipRows = ampere::Rows<2 * kTapBlocks>;

  // A stage is two rows of skip and one of x, with a column of squares on the left and half of one
  // on either side.
  static constexpr int kXPixels = kColumns + 2;
  static constexpr int kSkipPixels = 2 * kColumns + 2;
  // Pieces of 16 bytes of x, each in a plane: fragments of the next pixel are 16 bytes further.
  // Planes start so that 8 copies of neighbours are in different banks.
  static constexpr int kXPieces = 2 * x_blocks;
  static constexpr uint32_t kXPlaneBytes =
      (kXPixels * 16 - 128 / kXPieces + 127) / 128 * 128 + 128 / kXPieces;
  static constexpr uint32_t kXBytes = kXPieces * kXPlaneBytes;
  // Every other pixel of skip is in one plane: a product's rows are two pixels apart. The second
  // plane starts four groups of banks further, so that copies of neighbours are not in the same.
  static constexpr uint32_t kPlaneBytes =
      ((kSkipPixels / 2 * SkipRows::kBytes / 16 + 3) / 8 * 8 + 4) * 16;
  // Packed pixels lie as in the image, from the 16 bytes before the strip's first one on.
  static constexpr int kPackedPieces = 2 * kColumns * 6 / 16 + 2;
  static constexpr uint32_t kSkipBytes = kPacked ? 16 * kPackedPieces : 2 * kPlaneBytes;
  static constexpr uint32_t kX = 2 * kSkipBytes;  // where x starts
  static constexpr uint32_t kStageBytes = kX + kXBytes;

  // One is read, and the last row of the one before; six are on their way: 50 KB of a
  // multiprocessor at level 0 of L2P, twice what 1.4 us of latency take of its share of the memory.
  static constexpr int kStages = 8;
  static constexpr int kAhead = kStages - 2;

  // Pixel 0 of either is the one before the strip's first.
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t stage(int step) {
    return (step & (kStages - 1)) * kStageBytes;
  }
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t x(int pixel, int piece) {
    return piece * kXPlaneBytes + pixel * 16;
  }
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t skip_row(int row) { return row * kSkipBytes; }
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t skip(int pixel, int piece) {
    return pixel % 2 * kPlaneBytes + SkipRows::at(pixel / 2, piece);
  }

  // Copies of 16 bytes, numbered: skip's first, then those of x. Thread t makes those whose number
  // is t modulo the threads.
  static constexpr int kOfRow = kPacked ? kPackedPieces : kSkipPixels * SkipRows::kPieces;
  static constexpr int kOfSkip = 2 * kOfRow;
  static constexpr int kAll = kOfSkip + kXPixels * kXPieces;
  static constexpr int kCopies = (kAll + kThreads - 1) / kThreads;
  struct Copy {  // packed pixels are not told apart
    bool of_x;
    int row, pixel, piece;
    uint32_t to;
  };
  PIXELDIFF_HOST_DEVICE static constexpr Copy copy(int i) {
    if (i >= kOfSkip) {
      const int pixel = (i - kOfSkip) / kXPieces, piece = (i - kOfSkip) % kXPieces;
      return {true, 0, pixel, piece, kX + x(pixel, piece)};
    }
    if constexpr (kPacked) {
      const int row = i / kOfRow, piece = i % kOfRow;
      return {false, row, 0, piece, skip_row(row) + 16 * piece};
    }
    const int row = i / kOfRow, pixel = i % kOfRow / SkipRows::kPieces;
    const int piece = i % SkipRows::kPieces;
    return {false, row, pixel, piece, skip_row(row) + skip(pixel, piece)};
  }
  // Of a thread's k-th copy, i: whether there is one, and of what, without asking where all threads
  // have the same answer.
  PIXELDIFF_HOST_DEVICE static constexpr bool is_copy(int k, int i) {
    return (k + 1) * kThreads <= kAll || i < kAll;
  }
  PIXELDIFF_HOST_DEVICE static constexpr bool is_of_x(int k, int i) {
    return (k + 1) * kThreads > kOfSkip && (k * kThreads >= kOfSkip || i >= kOfSkip);
  }

  static constexpr uint32_t kAlignment = 128;  // all banks
  static constexpr uint32_t kSharedBytes = kStages * kStageBytes;
  static_assert(kAlignment + kSharedBytes <= 48 * 1024, "what a launch may ask for by itself");
};

}  // namespace pixeldiff::local_decoder
