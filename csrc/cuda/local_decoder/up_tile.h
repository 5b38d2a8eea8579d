// Shared memory and the division of work of local_decoder_up, for x and skip of so many blocks of
// 16 channels.
#pragma once

#include "../ampere/rows.h"

namespace pixeldiff::local_decoder {

template <int x_blocks, int skip_blocks>
struct UpTile {
  static constexpr int kXBlocks = x_blocks, kSkipBlocks = skip_blocks;
  // A block walks down a strip of squares of the result, a row of them a step. A warp has one
  // parity of 16 of them: the rows of its products.
  static constexpr int kSquares = 16;
  static constexpr int kGroups = 2;
  static constexpr int kColumns = kGroups * kSquares;
  static constexpr int kWarps = 4 * kGroups;
  static constexpr int kThreads = 32 * kWarps;
  // Registers hold all weights: 36 for each block of 16 channels.
  static constexpr int kBlocks = x_blocks + skip_blocks == 2 ? 2 : 1;  // of a multiprocessor

  using XRows = ampere::Rows<2 * x_blocks>;
  using SkipRows = ampere::Rows<2 * skip_blocks>;

  // A stage is one row of x and two of skip, with a column of squares on the left and half of one
  // on either side.
  static constexpr int kXPixels = kColumns + 2;
  static constexpr int kSkipPixels = 2 * kColumns + 2;
  static constexpr uint32_t kXBytes = kXPixels * XRows::kBytes;
  // Every other pixel of skip is in one plane: a product's rows are two pixels apart. The second
  // plane starts four groups of banks further, so that copies of neighbours are not in the same.
  static constexpr uint32_t kPlaneBytes =
      ((kSkipPixels / 2 * SkipRows::kBytes / 16 + 3) / 8 * 8 + 4) * 16;
  static constexpr uint32_t kSkipBytes = 2 * kPlaneBytes;
  static constexpr uint32_t kStageBytes = kXBytes + 2 * kSkipBytes;

  // One is read, of the one before the last row too, and two are on their way.
  static constexpr int kStages = 4;
  static constexpr int kAhead = 2;

  // Pixel 0 of either is the one before the strip's first.
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t stage(int step) {
    return (step & (kStages - 1)) * kStageBytes;
  }
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t x(int pixel, int piece) {
    return XRows::at(pixel, piece);
  }
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t skip_row(int row) {
    return kXBytes + row * kSkipBytes;
  }
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t skip(int pixel, int piece) {
    return pixel % 2 * kPlaneBytes + SkipRows::at(pixel / 2, piece);
  }

  static constexpr uint32_t kAlignment = 128;  // all banks
  static constexpr uint32_t kSharedBytes = kStages * kStageBytes;
  static_assert(kAlignment + kSharedBytes <= 48 * 1024, "what a launch may ask for by itself");
};

}  // namespace pixeldiff::local_decoder
