// local_decoder_up for few channels: what each warp does, and when.
//
// M is the machine it runs on: the GPU (ampere/device.cuh), or the emulator of the tests.
// Everything a thread does to shared memory or to other threads goes through it.
//
// A block walks down its strip, a row of squares a step. Warp 4 g + p has the pixels of parity p of
// the g-th 16 squares: what they have in common is that they meet the same weights, which therefore
// stay in registers. In step s row s of x and rows 2s and 2s + 1 of skip have arrived. A fragment
// of them is read once and multiplied for every row of squares that it reaches: s - 1, which is
// then complete, s, and s + 1. Copies are two steps ahead, and one barrier a step says that they
// are there and that what they overwrite is no longer read.
#pragma once

#include "../ampere/rows.h"
#include "../hopper/fragment.h"
#include "../local_decoder_up.h"
#include "packed.h"
#include "products.h"
#include "schedule.h"
#include "up_tile.h"
#include "up_weights.h"

namespace pixeldiff::local_decoder {

struct UpParams {
  Schedule schedule;
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
  using Segment = Schedule::Segment;

  M& m;
  const UpParams& p;

  uint32_t of_x[3][3][kXBlocks][4];                           // weights of (ey, ex), from -1 on
  uint32_t of_skip[3][Tile::kSkipTaps][Tile::kTapBlocks][4];  // of the second convolution's taps
  float shift[4];                                             // inside, of this lane's channels
  float sums[3][8];  // of rows of squares, by their number modulo 3

  // Where this thread's copies come from, in the row that is copied next, and go to in a stage;
  // whether there is something. Of the last ones some are of x.
  const char* from[Tile::kCopies];
  uint32_t to[Tile::kCopies];
  bool there[Tile::kCopies];
  // In a stage, what this lane says of fragments.
  uint32_t x_at, skip_at[3];
  // Its channels of its first pixel in the row of squares that is stored next, and whether its
  // pixels are of the image.
  char* out;
  bool inside[2];
  int edge;  // where in the warp's 16 squares the image's first or last column is

  // Of a warp.
  PIXELDIFF_DEVICE int parity() const { return m.thread() / 32 % 4; }
  PIXELDIFF_DEVICE int a() const { return parity() / 2; }
  PIXELDIFF_DEVICE int b() const { return parity() % 2; }
  PIXELDIFF_DEVICE int group() const { return m.thread() / 128; }
  PIXELDIFF_DEVICE int lane() const { return m.thread() % 32; }
  // For what is rare: nothing of it is kept in registers in between.
  PIXELDIFF_DEVICE int lane_again() const { return m.thread_again() & 31; }
  // The row and the column of squares whose u ends there.
  PIXELDIFF_DEVICE int edge_row() const { return a() == 0 ? 0 : p.schedule.rows - 1; }
  PIXELDIFF_DEVICE int edge_column() const { return b() == 0 ? 0 : p.schedule.columns - 1; }

  PIXELDIFF_DEVICE void run(const Segment at) {
    find_copies(at);
    find_fragments();
    find_results(at);
    for (int i = 0; i < Tile::kAhead; ++i) start_copies(at, at.first - 1 + i);
    PIXELDIFF_UNROLL
    for (int tap = 0; tap < 9; ++tap) {
      PIXELDIFF_UNROLL
      for (int block = 0; block < kXBlocks; ++block)
        load_fragment(p.layout.x(parity(), tap, block), of_x[tap / 3][tap % 3][block]);
      PIXELDIFF_UNROLL
      for (int block = 0; block < kSkipBlocks; ++block)
        load_fragment(p.layout.skip(tap, block), of_skip[tap / 3][tap % 3][block]);
    }
    if constexpr (Tile::kPacked) {
      PIXELDIFF_UNROLL
      for (int row = 0; row < 3; ++row)
        load_fragment(p.layout.packed(b(), row), of_skip[row][0][0]);
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
    const bool at_column = edge >= 0 && edge < Tile::kSquares, at_row = s == edge_row();
    start_sums(s + 1 == edge_row(), at_column, next);
    if (at_row) load_row(true);
    multiply_x(s, at_row, at_column, done, here, next);
    if (at_row) load_row(false);
    multiply_skip(s, done, here);
    if (s > at.first) store(done);
  }

  // --- copies

  PIXELDIFF_DEVICE void find_copies(const Segment& at) {
    PIXELDIFF_UNROLL
    for (int k = 0; k < Tile::kCopies; ++k) {
      const typename Tile::Copy copy = Tile::copy(m.thread() + k * Tile::kThreads);
      to[k] = copy.to;
      if (Tile::kPacked && !copy.of_x) {
        find_packed(at, copy, k);
        continue;
      }
      const cuda::Picture& t = copy.of_x ? p.x : p.skip;
      const int column = (copy.of_x ? at.column : 2 * at.column) - 1 + copy.pixel;
      const int columns = (copy.of_x ? 1 : 2) * p.schedule.columns;
      const int64_t row =
          copy.of_x ? at.first - 1 : 2 * static_cast<int64_t>(at.first - 1) + copy.row;
      const int image = copy.of_x ? at.image : at.image % p.skips;
      from[k] = static_cast<const char*>(t.data) +
                2 * (image * t.stride_b + row * t.stride_h + column * t.stride_w + 8 * copy.piece);
      there[k] =
          column >= 0 && column < columns && copy.piece < (copy.of_x ? p.x_pieces : p.skip_pieces);
    }
  }
  // A piece is of several pixels, and of the image or not as a whole.
  PIXELDIFF_DEVICE void find_packed(const Segment& at, const typename Tile::Copy& copy, int k) {
    const int64_t byte = 12 * static_cast<int64_t>(at.column) + 16 * (copy.piece - 1);
    const int64_t row = 2 * static_cast<int64_t>(at.first - 1) + copy.row;
    from[k] = static_cast<const char*>(p.skip.data) +
              2 * (at.image % p.skips * p.skip.stride_b + row * p.skip.stride_h) + byte;
    there[k] = byte >= 0 && byte < 12 * static_cast<int64_t>(p.schedule.columns);
  }

  // Row s of x and rows 2s and 2s + 1 of skip, as one group. What is outside is zero. To be called
  // for one row after the other.
  PIXELDIFF_DEVICE void start_copies(const Segment& at, int s) {
    // The last step needs the row below the segment's last.
    if (s <= at.last) {
      const bool inside = s >= 0 && s < p.schedule.rows;
      PIXELDIFF_UNROLL
      for (int k = 0; k < Tile::kCopies; ++k) {
        const int i = m.thread() + k * Tile::kThreads;
        if (!Tile::is_copy(k, i)) continue;
        m.copy16(Tile::stage(s) + to[k], from[k], inside && there[k]);
        from[k] += Tile::is_of_x(k, i) ? 2 * p.x.stride_h : 4 * p.skip.stride_h;
      }
    }
    m.commit_copies();
  }

  // --- weights

  PIXELDIFF_DEVICE void load_fragment(int at, uint32_t (&to)[4]) {
    m.template load_words<4>(p.weights + at + lane_again() * 16, to);
  }
  PIXELDIFF_DEVICE void load_shift(bool edge_y, bool edge_x, float (&to)[4]) {
    const char* from = p.weights + p.layout.shift(parity(), edge_y, edge_x) + lane_again() % 4 * 16;
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

  PIXELDIFF_DEVICE void find_fragments() {
    const ampere::Corner corner = ampere::down_first(lane());
    const int square = Tile::kSquares * group() + corner.row;
    x_at = Tile::x(square, corner.piece);
    PIXELDIFF_UNROLL
    for (int i = 0; i < 3 && !Tile::kPacked; ++i)
      skip_at[i] = Tile::skip(2 * square + b() + i, corner.piece);
    if constexpr (Tile::kPacked) {
      const int first = Tile::kSquares * group() + hopper::accumulator_row(0, lane(), 0);
      skip_at[0] = packed_at(first, b()) + lane() % 4 * 4;
    }
  }

  PIXELDIFF_DEVICE void start_sums(bool at_row, bool at_column, float (&to)[8]) {
    PIXELDIFF_UNROLL
    for (int i = 0; i < 8; ++i) to[i] = shift[accumulator_channel(i)];
    if (!at_row && !at_column) return;
    PIXELDIFF_UNROLL
    for (int half = 0; half < 2; ++half) {
      float here[4];
      load_shift(at_row, at_column && edge == hopper::accumulator_row(0, lane_again(), half), here);
      PIXELDIFF_UNROLL
      for (int i = 2 * half; i < 8; i += i % 2 ? 3 : 1) to[i] = here[accumulator_channel(i)];
    }
  }

  PIXELDIFF_DEVICE void multiply_x(int s, bool at_row, bool at_column, float (&done)[8],
                                   float (&here)[8], float (&next)[8]) {
    PIXELDIFF_UNROLL
    for (int ex = -1; ex <= 1; ++ex) {
      PIXELDIFF_UNROLL
      for (int block = 0; block < kXBlocks; ++block) {
        uint32_t values[4];
        const uint32_t from = Tile::stage(s) + Tile::kX + x_at + Tile::x(ex + 1, 2 * block);
        m.load_matrices(from, values);
        // The edge's square has a product of its own, in which the others are zero.
        const bool edged = ex == 0 && at_column;
        if (edged) keep_edge(false, values);
        add(m, done, values, of_x[2][ex + 1][block]);
        add(m, here, values, of_x[1][ex + 1][block]);
        add(m, next, values, of_x[0][ex + 1][block]);
        if (edged) {
          m.load_matrices(from, values);
          keep_edge(true, values);
          multiply_edge(at_row, block, values, done, here, next);
        }
      }
    }
  }
  PIXELDIFF_DEVICE void keep_edge(bool keep, uint32_t (&values)[4]) {
    const int lane = lane_again();
    PIXELDIFF_UNROLL
    for (int i = 0; i < 4; ++i)
      if ((edge == hopper::accumulator_row(0, lane, i % 2)) != keep) values[i] = 0;
  }
  PIXELDIFF_DEVICE void multiply_edge(bool at_row, int block, const uint32_t (&values)[4],
                                      float (&done)[8], float (&here)[8], float (&next)[8]) {
    uint32_t weights[4];
    load_fragment(p.layout.x(parity(), column_slot(at_row, 1), block), weights);
    add(m, done, values, weights);
    load_fragment(p.layout.x(parity(), column_slot(at_row, 0), block), weights);
    add(m, here, values, weights);
    load_fragment(p.layout.x(parity(), column_slot(at_row, -1), block), weights);
    add(m, next, values, weights);
  }

  PIXELDIFF_DEVICE void multiply_skip(int s, float (&done)[8], float (&here)[8]) {
    // Of rows 2s - 1 to 2s + 1 those beside and of this parity: the first has a neighbour above
    // too.
    const uint32_t shared = Tile::stage(s - 1 + a()) + Tile::skip_row(1 - a());
    const uint32_t own = Tile::stage(s) + Tile::skip_row(a());
    if constexpr (Tile::kPacked) {
      uint32_t values[4];
      load_packed(m, shared + skip_at[0], b(), lane(), values);
      add(m, done, values, of_skip[2][0][0]);
      add(m, here, values, of_skip[0][0][0]);
      load_packed(m, own + skip_at[0], b(), lane(), values);
      add(m, here, values, of_skip[1][0][0]);
    } else {
      PIXELDIFF_UNROLL
      for (int tap = 0; tap < 3; ++tap) {
        PIXELDIFF_UNROLL
        for (int block = 0; block < kSkipBlocks; ++block) {
          const uint32_t from = Tile::SkipRows::further(skip_at[tap], 2 * block);
          uint32_t values[4];
          m.load_matrices(shared + from, values);
          add(m, done, values, of_skip[2][tap][block]);
          add(m, here, values, of_skip[0][tap][block]);
          m.load_matrices(own + from, values);
          add(m, here, values, of_skip[1][tap][block]);
        }
      }
    }
  }

  // --- results

  PIXELDIFF_DEVICE void find_results(const Segment& at) {
    const int column = at.column + Tile::kSquares * group() + hopper::accumulator_row(0, lane(), 0);
    const int64_t y = 2 * (static_cast<int64_t>(at.image) * p.schedule.rows + at.first) + a();
    const int64_t pixel = y * (2 * p.schedule.columns) + 2 * column + b();
    out = p.out + (pixel * kOut + lane() % 4 * 4) * 2;
    inside[0] = column < p.schedule.columns, inside[1] = column + 8 < p.schedule.columns;
    edge = edge_column() - at.column - Tile::kSquares * group();
  }

  // Four channels of a pixel in each half of a row of squares. To be called for one row after the
  // other.
  PIXELDIFF_DEVICE void store(const float (&from)[8]) {
    PIXELDIFF_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t both[2];
      activate(m, from, half, both);
      if (inside[half]) m.store(out + half * (8 * 2 * kOut * 2), both[0], both[1]);
    }
    out += static_cast<int64_t>(p.schedule.columns) * (2 * 2 * kOut * 2);
  }
};

}  // namespace pixeldiff::local_decoder
