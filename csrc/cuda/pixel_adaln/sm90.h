// The sm_90a product of the pixel_adaln kernels, u W^T of some chunks, and who does what, when.
//
// M is the machine it runs on: the GPU (hopper/device.cuh), or the emulator of the tests. Epilogue
// makes the result of a warp's sums, in registers: no chunk is ever stored.
//
//   warpgroup 0   one thread loads: steps of 64 of D into a ring of stages, for itself and for the
//                 blocks that share its patches or its pixels (sm90_tile.h).
//   1 and 2       every other tile each, 128 patches by 128 columns: the sums of one are multiplied
//                 while those of the other are made a result.
//
// They take turns at issuing. A wait for a stage tells one use of it from the next, not from the
// one after: whoever starts a tile must know that all stages of the tile before have been filled.
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
  using Sums = float[2][Tile::kColumns / 2];  // of two m64
  static constexpr int kTurn = 1;  // named barrier of the first consumer; 0 is the block's

  M& m;
  const Schedule& schedule;
  const Epilogue& epilogue;

  PIXELDIFF_DEVICE void run(const Map& patches, const Map& weights) {
    if (m.thread() == 0) {
      for (int stage = 0; stage < Tile::kStages; ++stage) {
        m.barrier_init(Tile::full(stage), 1);
        m.barrier_init(Tile::empty(stage), kSharing * kWarpgroup / 32);
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
        m.wait_cluster(Tile::empty(ring.stage), ring.parity_of_writer());
        m.arrive_and_expect(full, Tile::kStageBytes);
        m.load_box_for(row_mask(rank), patches,
                       Tile::patches(ring.stage) + column * Tile::kBoxBytes, full, k, 0,
                       at.row + column * Tile::kBoxRows, 0);
        PIXELDIFF_UNROLL
        for (int n = 0; n < Tile::kBoxPixels; ++n) {
          const int pixel = line * Tile::kBoxPixels + n;
          m.load_box_for(column_mask(rank), weights,
                         Tile::weights(ring.stage) + pixel * Tile::kPixelBytes, full, k, 0,
                         Tile::weight_row(at.pixel + pixel), 0);
        }
      }
    }
  }

  PIXELDIFF_DEVICE void consume() {
    const int consumer = m.thread() / kWarpgroup - 1;
    const int clusters = m.blocks() / kCluster;
    const int steps = schedule.steps();
    Sums sums;
    const auto index = [&](int job) { return m.block() / kCluster + job * clusters; };
    for (int job = consumer; index(job) < schedule.tiles(); job += kConsumers) {
      const Schedule::Tile at = tile(index(job));
      const typename Epilogue::Given given = epilogue.load(m, at);
      const int first = job * steps;
      Ring ring{first % Tile::kStages, static_cast<uint32_t>(first / Tile::kStages)};
      int last = ring.stage;
      if (job > 0) m.named_sync(kTurn + consumer, kWarpgroup * kConsumers);
      for (int step = 0; step < steps; ++step, ring.advance()) {
        m.wait(Tile::full(ring.stage), ring.parity());
        m.wgmma_fence();
        multiply(ring.stage, step > 0, sums);
        m.wgmma_commit();
        if (step > 0) {
          m.template wgmma_wait<1>();
          leave(last);
        }
        last = ring.stage;
      }
      if (index(job + 1) < schedule.tiles())
        m.named_arrive(kTurn + (consumer + 1) % kConsumers, kWarpgroup * kConsumers);
      m.template wgmma_wait<0>(sums[0]);
      m.template wgmma_wait<0>(sums[1]);
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

  PIXELDIFF_DEVICE void multiply(int stage, bool add, Sums& sums) {
    const uint64_t a = hopper::advance(
        hopper::k_major(m.address(Tile::patches(0)), Tile::kRowBytes), stage * Tile::kStageBytes);
    const uint64_t b = hopper::advance(
        hopper::k_major(m.address(Tile::weights(0)), Tile::kRowBytes), stage * Tile::kStageBytes);
    PIXELDIFF_UNROLL
    for (int k = 0; k < Tile::kDepth; k += 16) PIXELDIFF_UNROLL
    for (int half = 0; half < 2; ++half)
      m.template wgmma_shared<kBf16>(sums[half],
                                     hopper::advance(a, half * 64 * Tile::kRowBytes + 2 * k),
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
