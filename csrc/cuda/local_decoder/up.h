// local_decoder_up for few channels: what each warp does, and when.
//
// M is the machine it runs on: the GPU (ampere/device.cuh), or the emulator of the tests. Everything
// a thread does to shared memory or to other threads goes through it.
//
// A block walks down its strip, a row of squares a step. Warp 4 g + p has the pixels of parity p of
// the g-th 16 squares: what they have in common is that they meet the same weights, which therefore
// stay in registers. In step s row s of x and rows 2s and 2s + 1 of skip have arrived. A fragment of
// them is read once and multiplied for every row of squares that it reaches: s - 1, which is then
// complete, s, and s + 1. Copies are two steps ahead, and one barrier a step says that they are
// there and that what they overwrite is no longer read.
#pragma once

#include "../ampere/rows.h"
#include "../hopper/fragment.h"
#include "../local_decoder_up.h"
#include "up_schedule.h"
#include "up_tile.h"
#include "up_weights.h"

namespace pixeldiff::local_decoder {

struct UpParams {
  UpSchedule schedule;
  int skips;
  int x_pieces, skip_pieces;  // of 8 channels
  cuda::Picture x, skip;
  Weights layout;
  const char* weights;
  char* out;
};

template <class M, int kXBlocks, int kSkipBlocks>
struct Up {
  using Tile = UpTile<kXBlocks, kSkipBlocks>;
  using Segment = UpSchedule::Segment;
  static constexpr int kXPieces = 2 * kXBlocks, kSkipPieces = 2 * kSkipBlocks;

  M& m;
  const UpParams& p;

  uint32_t of_x[3][3][kXBlocks][4];        // weights of (ey, ex), from -1 on
  uint32_t of_skip[3][3][kSkipBlocks][4];  // of the second convolution's taps
  float shift[4];                          // inside, of this lane's channels
  float sums[3][8];                        // of rows of squares, by their number modulo 3

  // Of a warp.
  PIXELDIFF_DEVICE int parity() const { return m.thread() / 32 % 4; }
  PIXELDIFF_DEVICE int a() const { return parity() / 2; }
  PIXELDIFF_DEVICE int b() const { return parity() % 2; }
  PIXELDIFF_DEVICE int group() const { return m.thread() / 128; }
  PIXELDIFF_DEVICE int lane() const { return m.thread() % 32; }
  // The row and the column of squares whose u ends there.
  PIXELDIFF_DEVICE int edge_row() const { return a() == 0 ? 0 : p.schedule.rows - 1; }
  PIXELDIFF_DEVICE int edge_column() const { return b() == 0 ? 0 : p.schedule.columns - 1; }

  PIXELDIFF_DEVICE void run() {
    const Segment at = p.schedule.segment(m.block());
    start_copies(at, at.first - 1);
    start_copies(at, at.first);
    PIXELDIFF_UNROLL
    for (int tap = 0; tap < 9; ++tap) {
      PIXELDIFF_UNROLL
      for (int block = 0; block < kXBlocks; ++block)
        load_fragment(p.layout.x(parity(), tap, block), of_x[tap / 3][tap % 3][block]);
      PIXELDIFF_UNROLL
      for (int block = 0; block < kSkipBlocks; ++block)
        load_fragment(p.layout.skip(tap, block), of_skip[tap / 3][tap % 3][block]);
    }
    load_shift(false, false, shift);
    PIXELDIFF_UNROLL
    for (int i = 0; i < 24; ++i) sums[i / 8][i % 8] = 0.0f;

    // Which of the sums is whose stays fixed in the code.
    for (int s = at.first - 1;;) {
      step<0>(at, s);
      if (s++ == at.last) break;
      step<1>(at, s);
      if (s++ == at.last) break;
      step<2>(at, s);
      if (s++ == at.last) break;
    }
  }

  // Of a step that is kTurn steps past the first, modulo 3.
  template <int kTurn>
  PIXELDIFF_DEVICE void step(const Segment& at, int s) {
    m.template wait_copies<Tile::kAhead - 1>();
    m.sync_block();
    start_copies(at, s + Tile::kAhead);

    float(&done)[8] = sums[(kTurn + 2) % 3];
    float(&here)[8] = sums[kTurn];
    float(&next)[8] = sums[(kTurn + 1) % 3];
    // Where in the warp's 16 squares the image's first or last column is.
    const int edge = edge_column() - at.column - Tile::kSquares * group();
    const bool at_column = edge >= 0 && edge < Tile::kSquares, at_row = s == edge_row();
    start_sums(s + 1 == edge_row(), at_column, edge, next);
    if (at_row) load_row(true);
    multiply_x(s, at_row, at_column, edge, done, here, next);
    if (at_row) load_row(false);
    multiply_skip(s, done, here);
    if (s > at.first) store(at, s - 1, done);
  }

  // --- copies

  // Row s of x and rows 2s and 2s + 1 of skip, as one group. What is outside is zero.
  PIXELDIFF_DEVICE void start_copies(const Segment& at, int s) {
    constexpr int kX = Tile::kXPixels * kXPieces, kSkip = Tile::kSkipPixels * kSkipPieces;
    // The last step needs the row below the segment's last.
    if (s <= at.last) {
      const bool inside = s >= 0 && s < p.schedule.rows;
      PIXELDIFF_UNROLL
      for (int i = m.thread(); i < kX + 2 * kSkip; i += Tile::kThreads) {
        if (i < 2 * kSkip) {
          const int row = i / kSkip, pixel = i % kSkip / kSkipPieces, piece = i % kSkipPieces;
          const int column = 2 * at.column - 1 + pixel;
          const char* from =
              address(p.skip, at.image % p.skips, 2 * static_cast<int64_t>(s) + row, column, piece);
          m.copy16(Tile::stage(s) + Tile::skip_row(row) + Tile::skip(pixel, piece), from,
                   inside && column >= 0 && column < 2 * p.schedule.columns && piece < p.skip_pieces);
        } else {
          const int pixel = (i - 2 * kSkip) / kXPieces, piece = (i - 2 * kSkip) % kXPieces;
          const int column = at.column - 1 + pixel;
          m.copy16(Tile::stage(s) + Tile::x(pixel, piece), address(p.x, at.image, s, column, piece),
                   inside && column >= 0 && column < p.schedule.columns && piece < p.x_pieces);
        }
      }
    }
    m.commit_copies();
  }
  PIXELDIFF_DEVICE static const char* address(const cuda::Picture& t, int image, int64_t row,
                                              int column, int piece) {
    return static_cast<const char*>(t.data) +
           2 * (image * t.stride_b + row * t.stride_h + column * t.stride_w + 8 * piece);
  }

  // --- weights

  PIXELDIFF_DEVICE void load_fragment(int at, uint32_t (&to)[4]) {
    m.template load_words<4>(p.weights + at + lane() * 16, to);
  }
  PIXELDIFF_DEVICE void load_shift(bool edge_y, bool edge_x, float (&to)[4]) {
    const char* from = p.weights + p.layout.shift(parity(), edge_y, edge_x) + lane() % 4 * 16;
    m.template load_floats<4>(reinterpret_cast<const float*>(from), to);
  }
  // What meets the squares' own row of x, of squares in this warp's edge row or of others.
  PIXELDIFF_DEVICE void load_row(bool edge) {
    PIXELDIFF_UNROLL
    for (int ex = -1; ex <= 1; ++ex) {
      const int slot = edge ? row_slot(ex) : inner_slot(0, ex);
      PIXELDIFF_UNROLL
      for (int block = 0; block < kXBlocks; ++block)
        load_fragment(p.layout.x(parity(), slot, block), of_x[1][ex + 1][block]);
    }
  }

  // --- products

  PIXELDIFF_DEVICE void start_sums(bool at_row, bool at_column, int edge, float (&to)[8]) {
    PIXELDIFF_UNROLL
    for (int i = 0; i < 8; ++i) to[i] = shift[accumulator_channel(i)];
    if (!at_row && !at_column) return;
    PIXELDIFF_UNROLL
    for (int half = 0; half < 2; ++half) {
      float here[4];
      load_shift(at_row, at_column && edge == hopper::accumulator_row(0, lane(), half), here);
      PIXELDIFF_UNROLL
      for (int i = 2 * half; i < 8; i += i % 2 ? 3 : 1) to[i] = here[accumulator_channel(i)];
    }
  }

  PIXELDIFF_DEVICE void add(float (&to)[8], const uint32_t (&values)[4],
                            const uint32_t (&weights)[4]) {
    m.template multiply<true>(&to[0], values, weights[0], weights[1]);
    m.template multiply<true>(&to[4], values, weights[2], weights[3]);
  }

  PIXELDIFF_DEVICE void multiply_x(int s, bool at_row, bool at_column, int edge, float (&done)[8],
                                   float (&here)[8], float (&next)[8]) {
    const ampere::Corner corner = ampere::down_first(lane());
    PIXELDIFF_UNROLL
    for (int ex = -1; ex <= 1; ++ex) {
      const int pixel = Tile::kSquares * group() + corner.row + 1 + ex;
      const uint32_t from = Tile::x(pixel, corner.piece);
      PIXELDIFF_UNROLL
      for (int block = 0; block < kXBlocks; ++block) {
        uint32_t values[4];
        m.load_matrices(Tile::stage(s) + Tile::XRows::further(from, 2 * block), values);
        if (ex == 0 && at_column) {
          // The edge's square has a product of its own, in which the others are zero.
          uint32_t alone[4];
          PIXELDIFF_UNROLL
          for (int i = 0; i < 4; ++i) {
            const bool is = edge == hopper::accumulator_row(0, lane(), i % 2);
            alone[i] = is ? values[i] : 0;
            values[i] = is ? 0 : values[i];
          }
          multiply_edge(at_row, block, alone, done, here, next);
        }
        add(done, values, of_x[2][ex + 1][block]);
        add(here, values, of_x[1][ex + 1][block]);
        add(next, values, of_x[0][ex + 1][block]);
      }
    }
  }
  PIXELDIFF_DEVICE void multiply_edge(bool at_row, int block, const uint32_t (&values)[4],
                                      float (&done)[8], float (&here)[8], float (&next)[8]) {
    uint32_t weights[4];
    load_fragment(p.layout.x(parity(), column_slot(at_row, 1), block), weights);
    add(done, values, weights);
    load_fragment(p.layout.x(parity(), column_slot(at_row, 0), block), weights);
    add(here, values, weights);
    load_fragment(p.layout.x(parity(), column_slot(at_row, -1), block), weights);
    add(next, values, weights);
  }

  PIXELDIFF_DEVICE void multiply_skip(int s, float (&done)[8], float (&here)[8]) {
    const ampere::Corner corner = ampere::down_first(lane());
    // Of rows 2s - 1 to 2s + 1 those beside and of this parity: the first has a neighbour above too.
    const int shared = 2 * s - 1 + a(), own = shared + 1;
    const uint32_t of_shared = Tile::stage(shared >> 1) + Tile::skip_row(shared & 1);
    const uint32_t of_own = Tile::stage(own >> 1) + Tile::skip_row(own & 1);
    PIXELDIFF_UNROLL
    for (int tap = 0; tap < 3; ++tap) {
      const int pixel = 2 * (Tile::kSquares * group() + corner.row) + b() + tap;
      const uint32_t from = Tile::skip(pixel, corner.piece);
      PIXELDIFF_UNROLL
      for (int block = 0; block < kSkipBlocks; ++block) {
        const uint32_t piece = Tile::SkipRows::further(from, 2 * block);
        uint32_t values[4];
        m.load_matrices(of_shared + piece, values);
        add(done, values, of_skip[2][tap][block]);
        add(here, values, of_skip[0][tap][block]);
        m.load_matrices(of_own + piece, values);
        add(here, values, of_skip[1][tap][block]);
      }
    }
  }

  // --- results

  PIXELDIFF_DEVICE float silu(float x) {
    constexpr float kLog2e = 1.4426950408889634f;
    return x * m.reciprocal(1.0f + m.exp2(-kLog2e * x));
  }

  // Four channels of a pixel in each half of row `row` of squares.
  PIXELDIFF_DEVICE void store(const Segment& at, int row, const float (&from)[8]) {
    const int first = at.column + Tile::kSquares * group();
    PIXELDIFF_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int column = first + hopper::accumulator_row(0, lane(), half);
      uint32_t both[2];
      PIXELDIFF_UNROLL
      for (int n = 0; n < 2; ++n) {
        const int i = 4 * n + 2 * half;
        both[n] = m.template pack<true>(silu(from[i]), silu(from[i + 1]));
      }
      const int64_t y = static_cast<int64_t>(at.image) * p.schedule.rows * 2 + 2 * row + a();
      const int64_t pixel = y * (2 * p.schedule.columns) + 2 * column + b();
      if (column < p.schedule.columns)
        m.store(p.out + (pixel * kOut + lane() % 4 * 4) * 2, both[0], both[1]);
    }
  }
};

}  // namespace pixeldiff::local_decoder
