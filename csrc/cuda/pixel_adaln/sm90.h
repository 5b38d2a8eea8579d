// The sm_90a product of the pixel_adaln kernels, u W^T of some chunks, and who does what, when.
//
// M is the machine it runs on: the GPU (hopper/device.cuh), or the emulator of the tests. Epilogue
// makes the result of a warp's sums, in registers: no chunk is ever stored.
//
//   warpgroup 0   one thread loads: steps of 64 of D into a ring of stages, for itself and for the
//                 blocks that share its patches or its pixels (sm90_tile.h).
//   1 and 2       either 64 patches each of every tile: nothing but the ring holds the two
//   together,
//                 and while one makes its sums a result the other may still multiply, or already
//                 again. Or every other tile each: the sums of one are multiplied while those of
//                 the other are made a result.
//
// With every other tile they take turns at issuing. A wait for a stage tells one use of it from the
// next, not from the one after: whoever starts a tile must know that all stages of the tile before
// have been filled.
#pragma once

#include "../hopper/descriptor.h"
#include "../hopper/ring.h"
#include "schedule.h"
#include "sm90_tile.h"

namespace pixeldiff::pixel_adaln {

template <class M, class Tile, class Epilogue, bool kBf16>
struct Sm90Product {
  using Map = typename M::TensorMap;
  using Ring = hopper::Ring<Tile::kStages>;
  using Sums = float[Tile::kParts][Tile::kColumns / 2];  // of each m64
  static constexpr int kTurn = 1;  // named barrier of the first consumer; 0 is the block's

  M& m;
  const Schedule& schedule;
  const Epilogue& epilogue;

  PIXELDIFF_DEVICE void run(const Map& patches, const Map& weights) {
    if (m.thread() == 0) {
      for (int stage = 0; stage < Tile::kStages; ++stage) {
        m.barrier_init(Tile::full(stage), 1);
        m.barrier_init(Tile::empty(stage), kSharing * Tile::kReaders);
      }
      m.publish_barriers();
    }
    m.sync_cluster();
    // One branch for each role: the registers can change hands only so. Nobody leaves before the
    // last arrival at its barriers from another block.
    if (m.thread() < kWarpgroup) {
      m.template release_registers<40>();
      if (m.thread() == 0) load(patches, weights);
      m.sync_cluster();
    } else {
      m.template claim_registers<232>();
      consume();
      m.sync_cluster();
    }
  }

  PIXELDIFF_DEVICE void load(const Map& patches, const Map& weights) {
    const int rank = m.rank(), line = cluster_row(rank), column = cluster_column(rank);
    Ring ring;
    for (int i = m.block() / kCluster; i < schedule.tiles(); i += m.blocks() / kCluster) {
      const Schedule::Tile at = tile(i);
      for (int step = 0; step < schedule.steps(); ++step, ring.advance()) {
        const int k = step * Tile::kDepth;
        const uint32_t full = Tile::full(ring.stage);
        m.wait(Tile::empty(ring.stage), ring.parity_of_writer());
        m.arrive_and_expect(full, Tile::kStageBytes);
        m.load_box_for(row_mask(rank), patches,
                       Tile::patches(ring.stage) + column * Tile::kBoxBytes, full, k, 0,
                       at.row + column * Tile::kBoxRows, 0);
        for (int box = 0; box < Tile::kBoxes; ++box)
          m.load_box_for(column_mask(rank), weights, Tile::weights(ring.stage, line, box), full, k,
                         Tile::box(box).row, Tile::box(box).octet,
                         at.pixel + line * Tile::kBoxPixels);
      }
    }
  }

  PIXELDIFF_DEVICE void consume() {
    const int consumer = m.thread() / kWarpgroup - 1;
    const int clusters = m.blocks() / kCluster;
    const int steps = schedule.steps();
    Sums sums;
    const auto index = [&](int job) { return m.block() / kCluster + job * clusters; };
    for (int job = Tile::kTogether ? 0 : consumer; index(job) < schedule.tiles();
         job += Tile::kTogether ? 1 : kConsumers) {
      Schedule::Tile at = tile(index(job));
      if (Tile::kTogether) at.row += 64 * consumer;
      const typename Epilogue::Given given = epilogue.load(m, at);
      const int first = job * steps;
      Ring ring{first % Tile::kStages, static_cast<uint32_t>(first / Tile::kStages)};
      int last = ring.stage;
      if (!Tile::kTogether && job > 0) m.named_sync(kTurn + consumer, kWarpgroup * kConsumers);
      for (int step = 0; step < steps; ++step, ring.advance()) {
        m.wait(Tile::full(ring.stage), ring.parity());
        m.wgmma_fence();
        multiply(Tile::kTogether ? consumer : 0, ring.stage, step > 0, sums);
        m.wgmma_commit();
        if (step > 0) {
          m.template wgmma_wait<1>();
          leave(last);
        }
        last = ring.stage;
      }
      if (!Tile::kTogether && index(job + 1) < schedule.tiles())
        m.named_arrive(kTurn + (consumer + 1) % kConsumers, kWarpgroup * kConsumers);
      PIXELDIFF_UNROLL
      for (int part = 0; part < Tile::kParts; ++part) m.template wgmma_wait<0>(sums[part]);
      leave(last);
      epilogue.store(m, at, given, sums);
    }
  }

  // This block's tile of a cluster's.
  PIXELDIFF_DEVICE Schedule::Tile tile(int i) const {
    const Schedule::Tile at = schedule.tile(i);
    return {at.row + cluster_row(m.rank()) * Tile::kRows,
            at.pixel + cluster_column(m.rank()) * Tile::kPixels};
  }

  // `first` of the tile's m64.
  PIXELDIFF_DEVICE void multiply(int first, int stage, bool add, Sums& sums) {
    const uint32_t rows = first * 64 * Tile::kRowBytes;
    const uint64_t a =
        hopper::advance(hopper::k_major(m.address(Tile::patches(0) + rows), Tile::kRowBytes),
                        stage * Tile::kStageBytes);
    const uint64_t b = hopper::advance(
        hopper::k_major(m.address(Tile::weights(0)), Tile::kRowBytes), stage * Tile::kStageBytes);
    PIXELDIFF_UNROLL
    for (int k = 0; k < Tile::kDepth; k += 16) PIXELDIFF_UNROLL
    for (int part = 0; part < Tile::kParts; ++part)
      m.template wgmma_shared<kBf16>(sums[part],
                                     hopper::advance(a, part * 64 * Tile::kRowBytes + 2 * k),
                                     hopper::advance(b, 2 * k), add || k > 0);
  }

  // This warp has read the stage: every block that may fill it is told.
  PIXELDIFF_DEVICE void leave(int stage) {
    m.sync_warp();
    const int lane = m.thread() % 32;
    if (lane < kSharing) m.arrive_at(sharing(m.rank(), lane), Tile::empty(stage));
  }
};

}  // namespace pixeldiff::pixel_adaln
