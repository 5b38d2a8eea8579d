// The sm_90a pixel_adaln kernels on the emulator, for ctypes.
#include <algorithm>

#include "cuda/pixel_adaln/launch_sm90.h"
#include "cuda/pixel_adaln/sm90.h"
#include "emulator.h"

namespace {

using namespace pixeldiff;
using namespace pixeldiff::pixel_adaln;

struct Call {
  cuda::PixelAdalnMlpArgs args;
  int clusters, fault, low, high;
  uint64_t seed;
};

template <bool kBf16>
void run(const Call& c) {
  using Tile = typename Mlp<kBf16>::Tile;
  const auto& a = c.args;
  const Schedule schedule = schedule_of<Tile>(a.rows, a.pixels, a.D);
  const Mlp<kBf16> mlp = mlp_of<kBf16>(a);
  const auto map = [](const hopper::TensorMapSpec& spec) {
    if (const char* reason = hopper::why_not(spec)) emulator::fail(reason);
    return emulator::Map{spec};
  };
  const emulator::Map patches = map(patches_map<Tile>(a)), weights = map(weights_map<Tile>(a));
  emulator::Ranges ranges;
  const auto range = [](const void* p, int64_t elements) {
    return std::make_pair(static_cast<const char*>(p), static_cast<const char*>(p) + 2 * elements);
  };
  ranges.writable = {range(a.out, a.rows * a.pixels * 16)};
  ranges.readable = {
      range(a.q, (a.rows - 1) * a.q_stride_row + (a.pixels - 1) * a.q_stride_pixel + 16),
      range(a.a, a.rows * a.pixels * 16),
      range(a.ada_bias, 96 * a.pixels),
      range(a.norm, 16),
      range(a.fc1_weight, 16 * a.hidden),
      range(a.fc1_bias, a.hidden),
      range(a.fc2_weight, 16 * a.hidden),
      range(a.fc2_bias, 16)};
  for (int cluster = 0; cluster < c.clusters; ++cluster) {
    emulator::Block machine(kThreads, Tile::kBarriers, kCluster * cluster, kCluster * c.clusters,
                            c.seed + cluster, static_cast<emulator::Fault>(c.fault), c.low, c.high,
                            ranges, kCluster);
    machine.run([&](emulator::Thread& thread) {
      Sm90Product<emulator::Thread, Tile, Mlp<kBf16>, kBf16>{thread, schedule, mlp}.run(patches,
                                                                                        weights);
    });
  }
}

}  // namespace

extern "C" int emulate_pixel_adaln_mlp(const Call* c, char* message, int room) {
  try {
    cuda::check_args(c->args);
    c->args.dtype == DType::bf16 ? run<true>(*c) : run<false>(*c);
    return 0;
  } catch (const std::exception& e) {
    std::strncpy(message, e.what(), room - 1);
    return 1;
  }
}

// full and empty of the first stage, and the number of stages.
extern "C" void pixel_adaln_barriers(int* out) {
  using Tile = Mlp<true>::Tile;
  out[0] = Tile::full(0);
  out[1] = Tile::empty(0);
  out[2] = Tile::kStages;
}

// First patch and first pixel of every tile of a cluster, and the number of them.
extern "C" int pixel_adaln_schedule(int64_t rows, int64_t pixels, int* out) {
  const Schedule schedule = schedule_of<Mlp<true>::Tile>(rows, pixels, 64);
  for (int i = 0; out != nullptr && i < schedule.tiles(); ++i) {
    out[2 * i] = schedule.tile(i).row;
    out[2 * i + 1] = schedule.tile(i).pixel;
  }
  return schedule.tiles();
}

// Of a block in a cluster: line, column, masks of its line and column, and the blocks that share
// its patches or its pixels.
extern "C" void pixel_adaln_cluster(int rank, int* out) {
  const int all[] = {cluster_row(rank), cluster_column(rank), row_mask(rank),  column_mask(rank),
                     sharing(rank, 0),  sharing(rank, 1),     sharing(rank, 2)};
  std::copy(std::begin(all), std::end(all), out);
}

extern "C" int pixel_adaln_value(int pixel, int chunk, int half, int row, int side) {
  return Mlp<true>::Tile::value(pixel, chunk, half, row, side);
}
