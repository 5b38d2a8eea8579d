// The arithmetic of csrc/cuda/hopper and csrc/cuda/attention, for ctypes.
#include <cstring>

#include "cuda/ampere/rows.h"
#include "cuda/attention/exp2.h"
#include "cuda/attention/mma_tile.h"
#include "cuda/attention/schedule.h"
#include "cuda/attention/sm90_tile.h"
#include "cuda/hopper/descriptor.h"
#include "cuda/hopper/encode.h"
#include "cuda/hopper/fragment.h"
#include "cuda/hopper/ring.h"
#include "cuda/hopper/swizzle.h"

using namespace pixeldiff;

extern "C" {

uint32_t swizzle(uint32_t address, uint32_t width) { return hopper::swizzle(address, width); }
uint64_t k_major(uint32_t start, uint32_t width) { return hopper::k_major(start, width); }
uint64_t n_major(uint32_t start, uint32_t width, uint32_t panel_bytes) {
  return hopper::n_major(start, width, panel_bytes);
}
uint64_t advance(uint64_t descriptor, uint32_t bytes) { return hopper::advance(descriptor, bytes); }

int accumulator_row(int warp, int lane, int i) {
  return hopper::accumulator_row(warp, lane, hopper::accumulator_half(i));
}
int accumulator_column(int lane, int i) { return hopper::accumulator_column(lane, i); }
int operand_from_accumulator(int k, int r) { return hopper::operand_from_accumulator(k, r); }
int operand8_from_accumulator(int k, int r) { return hopper::operand8_from_accumulator(k, r); }
int column_at(int position) { return hopper::column_at(position); }

void exp2_polynomial(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = attention::exp2_polynomial(x[i]);
}

// Of use n of a ring: stage, parity the reader waits for, parity the writer waits for.
void ring(int stages, int n, int* out) {
  const auto go = [&](auto use) {
    for (int i = 0; i < n; ++i) use.advance();
    out[0] = use.stage;
    out[1] = static_cast<int>(use.parity());
    out[2] = static_cast<int>(use.parity_of_writer());
  };
  stages == 1   ? go(hopper::Ring<1>{})
  : stages == 2 ? go(hopper::Ring<2>{})
  : stages == 3 ? go(hopper::Ring<3>{})
                : go(hopper::Ring<4>{});
}

int tiles(int B, int L, int S, int G, int* steps) {
  const attention::Schedule schedule{B, L, S, G, attention::kQueries, attention::kKeys};
  *steps = schedule.steps();
  return schedule.tiles();
}
void tile(int B, int L, int S, int G, int i, int* out) {
  const auto at = attention::Schedule{B, L, S, G, attention::kQueries, attention::kKeys}.tile(i);
  out[0] = at.b;
  out[1] = at.g;
  out[2] = at.row;
}

// Bytes of shared memory, stages, bytes of a row of a panel and of a tile.
void shared_memory(int channels, int* out) {
  const auto fill = [&](auto shape) {
    using Tile = decltype(shape);
    const int all[] = {Tile::kSharedBytes, Tile::kStages, Tile::kRowBytes, Tile::kTileBytes};
    std::memcpy(out, all, sizeof all);
  };
  channels == 64   ? fill(attention::Sm90Tile<64>{})
  : channels == 80 ? fill(attention::Sm90Tile<80>{})
                   : fill(attention::Sm90Tile<128>{});
}

// Of rows of 16, 32, 64, 80 or 128 channels: where a piece lies, and `more` pieces further.
uint32_t piece_at(int channels, int row, int piece, int more) {
  const auto find = [&](auto rows) { return rows.further(rows.at(row, piece), more); };
  return channels == 16   ? find(ampere::Rows<2>{})
         : channels == 32 ? find(ampere::Rows<4>{})
         : channels == 64 ? find(ampere::Rows<8>{})
         : channels == 80 ? find(ampere::Rows<10>{})
                          : find(ampere::Rows<16>{});
}
void down_first(int lane, int* out) {
  const ampere::Corner corner = ampere::down_first(lane);
  out[0] = corner.row, out[1] = corner.piece;
}
void across_first(int lane, int* out) {
  const ampere::Corner corner = ampere::across_first(lane);
  out[0] = corner.row, out[1] = corner.piece;
}

// Of the mma.sync kernel: bytes of shared memory, keys of a step, blocks of a multiprocessor; where
// queries, then keys and values of both stages lie.
void mma_memory(int channels, int* out) {
  const auto fill = [&](auto shape) {
    using Tile = decltype(shape);
    const uint32_t all[] = {Tile::kSharedBytes, Tile::kKeys, Tile::kBlocks, Tile::q,
                            Tile::k(0),         Tile::v(0),  Tile::k(1),    Tile::v(1)};
    std::memcpy(out, all, sizeof all);
  };
  channels == 64   ? fill(attention::MmaTile<64>{})
  : channels == 80 ? fill(attention::MmaTile<80>{})
                   : fill(attention::MmaTile<128>{});
}

// Encodes with the given driver; 0, or 1 and a message.
int encode(hopper::EncodeTiled driver, const void* data, int bf16, const int64_t* sizes,
           const int64_t* strides, int columns, int rows, void* map, char* message) {
  try {
    const Heads heads{data, strides[0], strides[1], strides[2]};
    const auto spec =
        hopper::heads_map(heads, bf16, sizes[0], sizes[1], sizes[2], sizes[3],
                          static_cast<uint32_t>(columns), static_cast<uint32_t>(rows));
    hopper::encode(driver, "k", spec, map);
    return 0;
  } catch (const std::exception& e) {
    std::strncpy(message, e.what(), 199);
    return 1;
  }
}
}
