// Rows of 16-bit elements in shared memory, in pieces of 16 bytes that cp.async writes and ldmatrix
// reads, and which piece each lane of a warp reads.
//
// Both take 8 pieces at a time, 128 bytes, and do so at once where the 8 lie in different groups of
// four banks. cp.async writes neighbours of a row; ldmatrix reads the same piece of 8 rows.
#pragma once

#include "../hopper/host_device.h"

namespace pixeldiff::ampere {

template <int pieces>
struct Rows {
  static constexpr int kPieces = pieces;
  static constexpr uint32_t kBytes = 16 * kPieces;
  // Rows of whole 128 bytes start in the same bank: their pieces change places by the row's number.
  // Those of 32 bytes more start two groups further each, 4 rows in 4 different ones, and the next
  // 4 in the same: there neighbours change places. Rows of 64 bytes are two to 128: each two of
  // them change places another way.
  static_assert(kPieces % 8 == 0 || kPieces % 8 == 2 || kPieces == 4,
                "16, 32, 64, 80 or 128 channels");

  PIXELDIFF_HOST_DEVICE static constexpr int turned(int row, int piece) {
    return piece ^ (kPieces % 8 == 0 ? row % 8 : kPieces == 4 ? row / 2 % 4 : row / 4 % 2);
  }
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t at(int row, int piece) {
    return row * kBytes + turned(row, piece) * 16;
  }
  // at(row, piece + more), for even `more` from at(row, piece) with piece 0 or 1: one instruction
  // or none, and the lane's own part is computed once.
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t further(uint32_t at, int more) {
    return kPieces % 4 == 0 ? at ^ (more * 16) : at + more * 16;
  }
};

// Four matrices of 8 x 8, two of them one below the other and two side by side: lane l names the
// row l % 8 of matrix l / 8. Registers 0 to 3 of every lane are then of matrices 0 to 3.
struct Corner {
  int row, piece;
};
// Down first: A of m16n8k16 where the rows are M, and (transposed) B of two products side by side
// where the rows are K.
PIXELDIFF_HOST_DEVICE constexpr Corner down_first(int lane) { return {lane % 16, lane / 16}; }
// Across first: B of two products where the rows are N.
PIXELDIFF_HOST_DEVICE constexpr Corner across_first(int lane) {
  return {lane / 16 * 8 + lane % 8, lane / 8 % 2};
}

}  // namespace pixeldiff::ampere
