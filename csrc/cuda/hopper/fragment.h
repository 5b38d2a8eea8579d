// Which elements of a matrix the registers of a thread hold, in wgmma and in mma.sync alike.
//
// PTX ISA, "Register fragments and shared memory matrix layouts" of wgmma.mma_async .m64nNk16. Warp
// w of a warpgroup holds rows 16 w to 16 w + 15; `lane` and `warp` below are within the warpgroup.
#pragma once

#include "host_device.h"

namespace pixeldiff::hopper {

// Register i of the accumulator of m64nN, N / 2 registers a thread.
PIXELDIFF_HOST_DEVICE constexpr int accumulator_half(int i) { return i / 2 % 2; }
PIXELDIFF_HOST_DEVICE constexpr int accumulator_row(int warp, int lane, int half) {
  return 16 * warp + lane / 4 + 8 * half;
}
PIXELDIFF_HOST_DEVICE constexpr int accumulator_column(int lane, int i) {
  return i / 4 * 8 + lane % 4 * 2 + i % 2;
}

// The 16 columns from 16 k on of an accumulator are the A operand of a product over them: its
// register r, of 4, holds accumulator registers first and first + 1, the first in the low half.
PIXELDIFF_HOST_DEVICE constexpr int operand_from_accumulator(int k, int r) { return 8 * k + 2 * r; }

// For 8-bit operands (PTX ISA, .m64nNk32) the A operand of a product over 32 columns, from 32 k on,
// is 4 registers of 4 bytes, and its columns are dealt to lanes four at a time where those of an
// accumulator are dealt in pairs. So no lane holds what it would have to give; but a product does
// not depend on the order of what it sums over. Register r takes, lowest byte first, what the
// lane has: accumulator registers first, first + 1, first + 4, first + 5. The contraction then
// meets the columns of the accumulator in the order of `column_at`, and B must be stored in it.
PIXELDIFF_HOST_DEVICE constexpr int operand8_from_accumulator(int k, int r) {
  return 16 * k + 8 * (r / 2) + 2 * (r % 2);
}
// The column, of 32, that comes at `position` of the contraction: bits 4, 1, 3, 2, 0 of it.
PIXELDIFF_HOST_DEVICE constexpr int column_at(int position) {
  return (position & 17) | (position & 2) << 2 | (position & 12) >> 1;
}
// The column of B of mma.sync .m16n8k16 that a thread holds, in its two registers: of each 8 rows
// the two that are the columns of its accumulator.
PIXELDIFF_HOST_DEVICE constexpr int operand_column(int lane) { return lane / 4; }

}  // namespace pixeldiff::hopper
