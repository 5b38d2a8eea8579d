// The sm_90a projection kernel: what each warp does, and when.
//
// M is the machine it runs on: the GPU (hopper/device.cuh), or the emulator of the tests, which
// runs this very text on a CPU. Everything a thread does to shared memory, to barriers or to other
// threads goes through it.
//
//   warpgroup 0   one thread loads: 64 channels of 128 rows of x and of a tile's rows of W, stage
//                 after stage, tile after tile, as far ahead as there are stages.
//   1 and 2       64 rows each of the same tile: products of a stage while those of the one before
//                 finish; then the norm, the rotation and the stores, straight from the registers.
//                 Nothing but the ring holds the two together: while one is at its stores the other
//                 may still multiply, or already again.
#pragma once

#include "../hopper/descriptor.h"
#include "../hopper/fragment.h"
#include "../hopper/ring.h"
#include "epilogue.h"
#include "sm90_tile.h"

namespace pixeldiff::qkv {

struct Sm90Stream {
  int first;  // row of the joint buffer that its row 0 goes to
  const char *q_weight, *k_weight;
  const float *cos, *sin;
  int64_t cos_stride, sin_stride;
};

struct Sm90Params {
  Schedule schedule;
  Sm90Stream streams[2];  // image, text
  int K, G;
  int joint;  // rows of the buffer
  char* out;  // (3, B, joint, G, d) contiguous, 16-bit
  float eps;
};

template <class M, class Columns, bool kBf16>
struct Sm90Projection {
  using Tile = Sm90Tile<Columns>;
  using Map = typename M::TensorMap;
  using Ring = hopper::Ring<Tile::kStages>;
  using Row = Epilogue<M, Columns, kBf16>;
  static constexpr int kWarps = 4 * kConsumers;
  static constexpr int kSums = Columns::kColumns / 2;  // of a thread

  M& m;
  const Sm90Params& p;

  // Of each stream: its x, its W. Those of a text without rows are not used.
  PIXELDIFF_DEVICE void run(const Map& x, const Map& weight, const Map& text_x,
                            const Map& text_weight) {
    if (m.thread() == 0) {
      for (int stage = 0; stage < Tile::kStages; ++stage) {
        m.barrier_init(Tile::full(stage), 1);
        m.barrier_init(Tile::empty(stage), kWarps);
      }
      m.publish_barriers();
    }
    m.sync_block();
    // One branch for each role: the registers can change hands only so.
    if (m.thread() < kWarpgroup) {
      m.template release_registers<40>();
      if (m.thread() == 0) load(x, weight, text_x, text_weight);
    } else {
      m.template claim_registers<232>();
      consume();
    }
  }

  PIXELDIFF_DEVICE int steps() const { return (p.K + kDepth - 1) / kDepth; }

  PIXELDIFF_DEVICE void load(const Map& x, const Map& weight, const Map& text_x,
                             const Map& text_weight) {
    Ring ring;
    for (int i = m.block(); i < p.schedule.tiles(); i += m.blocks()) {
      const Schedule::Tile at = p.schedule.tile(i);
      const Map& rows = at.stream ? text_x : x;
      const Map& columns = at.stream ? text_weight : weight;
      for (int step = 0; step < steps(); ++step, ring.advance()) {
        const uint32_t full = Tile::full(ring.stage);
        m.wait(Tile::empty(ring.stage), ring.parity_of_writer());
        // What lies outside of a tensor counts too.
        m.arrive_and_expect(full, Tile::kStageBytes);
        m.load_box(rows, Tile::x(ring.stage), full, step * kDepth, 0, at.row, at.b);
        for (int box = 0; box < Columns::kBoxes; ++box)
          m.load_box(columns, Tile::weight(ring.stage, box), full, step * kDepth,
                     box * Columns::kOctetRows, at.column * Columns::kOctets, 0);
      }
    }
  }

  PIXELDIFF_DEVICE void consume() {
    const int consumer = m.thread() / kWarpgroup - 1;
    const int warp = m.thread() % kWarpgroup / 32;
    const int lane = m.thread() % 32;
    Ring ring;
    float sums[kSums];

    for (int i = m.block(); i < p.schedule.tiles(); i += m.blocks()) {
      const Schedule::Tile at = p.schedule.tile(i);
      const Sm90Stream& stream = p.streams[at.stream];
      int before = 0;
      for (int step = 0; step < steps(); ++step, ring.advance()) {
        m.wait(Tile::full(ring.stage), ring.parity());
        m.wgmma_fence();
        multiply(consumer, ring.stage, step > 0, sums);
        m.wgmma_commit();
        if (step > 0) {
          m.template wgmma_wait<1>();
          leave(Tile::empty(before));
        }
        before = ring.stage;
      }
      const int row = at.row + 64 * consumer + hopper::accumulator_row(warp, lane, 0);
      typename Row::Angles angles;
      load_angles(angles, stream, row, at, lane);  // while the last products run
      m.template wgmma_wait<0>(sums);
      leave(Tile::empty(before));
      finish(stream, at, row, 0, sums, angles, lane);
      load_angles(angles, stream, row + 8, at, lane);
      finish(stream, at, row + 8, 1, sums, angles, lane);
    }
  }

  // This warp has read what lies behind the barrier.
  PIXELDIFF_DEVICE void leave(uint32_t empty) {
    m.sync_warp();
    if (m.thread() % 32 == 0) m.arrive(empty);
  }

  // x and W both lie with the channels of K side by side.
  PIXELDIFF_DEVICE void multiply(int consumer, int stage, bool add, float (&sums)[kSums]) {
    const uint32_t rows = consumer * 64 * Tile::kRowBytes;
    const uint32_t at = stage * Tile::kStageBytes;
    const uint64_t x =
        hopper::advance(hopper::k_major(m.address(Tile::x(0) + rows), Tile::kRowBytes), at);
    const uint64_t weight =
        hopper::advance(hopper::k_major(m.address(Tile::weight(0)), Tile::kRowBytes), at);
    PIXELDIFF_UNROLL
    for (int k = 0; k < kDepth; k += 16)
      m.template wgmma_shared<kBf16>(sums, hopper::advance(x, 2 * k),
                                     hopper::advance(weight, 2 * k), add || k > 0);
  }

  // Rows past the last have the last one's.
  PIXELDIFF_DEVICE void load_angles(typename Row::Angles& angles, const Sm90Stream& stream, int row,
                                    const Schedule::Tile& at, int lane) {
    const int last = p.schedule.rows[at.stream] - 1;
    const int64_t n = row < last ? row : last;
    angles.load(m, stream.cos + n * stream.cos_stride, stream.sin + n * stream.sin_stride, lane);
  }

  // One of this thread's two rows, head by head.
  PIXELDIFF_DEVICE void finish(const Sm90Stream& stream, const Schedule::Tile& at, int row,
                               int half, const float (&sums)[kSums],
                               const typename Row::Angles& angles, int lane) {
    const bool inside = row < p.schedule.rows[at.stream];
    const int64_t n = static_cast<int64_t>(at.b) * p.joint + stream.first + row;
    const int64_t part_rows = static_cast<int64_t>(p.schedule.B) * p.joint;
    PIXELDIFF_UNROLL
    for (int head = 0; head < Columns::kHeads; ++head) {
      const int index = at.column * Columns::kHeads + head;  // of the heads of q, k and v
      if (index >= 3 * p.G) break;  // the last tile may be wider than what is left
      const int part = (index >= p.G) + (index >= 2 * p.G);
      Row values;
      values.round(m, sums, head, half);
      if (part < 2)
        values.normalise_and_turn(m, part ? stream.k_weight : stream.q_weight, p.eps, angles, lane);
      const int64_t to = ((part * part_rows + n) * p.G + index - part * p.G) * Columns::kHeadDim;
      if (inside) values.store(m, p.out + 2 * to, lane);
    }
  }
};

}  // namespace pixeldiff::qkv
