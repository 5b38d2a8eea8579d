// The sm_90a pixel_adaln kernels on the emulator, for ctypes.
#include <algorithm>

#include "cuda/hopper/encode.h"
#include "cuda/pixel_adaln/launch_sm90.h"
#include "cuda/pixel_adaln/sm90.h"
#include "emulator.h"

namespace {

using namespace pixeldiff;
using namespace pixeldiff::pixel_adaln;

struct How {
  int clusters, fault, low, high;
  uint64_t seed;
};

using Range = std::pair<const char*, const char*>;

Range range(const void* p, int64_t elements) {
  return {static_cast<const char*>(p), static_cast<const char*>(p) + 2 * elements};
}

// What both kernels read and write.
emulator::Ranges ranges_of(const cuda::PixelAdalnArgs& a) {
  emulator::Ranges ranges;
  ranges.writable = {range(a.out, a.rows * a.pixels * 16)};
  ranges.readable = {
      range(a.q, (a.rows - 1) * a.q_stride_row + (a.pixels - 1) * a.q_stride_pixel + 16),
      range(a.ada_bias, 96 * a.pixels), range(a.norm, 16)};
  return ranges;
}

template <bool kBf16, class Epilogue>
void run(const cuda::PixelAdalnArgs& a, const Epilogue& epilogue, const emulator::Ranges& ranges,
         const How& how) {
  using Tile = typename Epilogue::Tile;
  const Schedule schedule = schedule_of<Tile>(a.rows, a.pixels, a.D);
  const auto map = [](const hopper::TensorMapSpec& spec) {
    if (const char* reason = hopper::why_not(spec)) emulator::fail(reason);
    return emulator::Map{spec};
  };
  const emulator::Map patches = map(patches_map<Tile>(a)), weights = map(weights_map<Tile>(a));
  for (int cluster = 0; cluster < how.clusters; ++cluster) {
    emulator::Block machine(kThreads, Tile::kBarriers, kCluster * cluster, kCluster * how.clusters,
                            how.seed + cluster, static_cast<emulator::Fault>(how.fault), how.low,
                            how.high, ranges, kCluster);
    machine.run([&](emulator::Thread& thread) {
      Sm90Product<emulator::Thread, Tile, Epilogue, kBf16>{thread, schedule, epilogue}.run(patches,
                                                                                           weights);
    });
  }
}

template <bool kBf16>
void run(const cuda::PixelAdalnMlpArgs& a, const How& how) {
  emulator::Ranges ranges = ranges_of(a);
  for (const Range& more :
       {range(a.a, a.rows * a.pixels * 16), range(a.fc1_weight, 16 * a.hidden),
        range(a.fc1_bias, a.hidden), range(a.fc2_weight, 16 * a.hidden), range(a.fc2_bias, 16)})
    ranges.readable.push_back(more);
  run<kBf16>(a, mlp_of<kBf16>(a), ranges, how);
}
template <bool kBf16>
void run(const cuda::PixelAdalnCompressArgs& a, const How& how) {
  run<kBf16>(a, compress_of<kBf16>(a), ranges_of(a), how);
}

int guarded(char* message, int room, const std::function<void()>& work) {
  try {
    work();
    return 0;
  } catch (const std::exception& e) {
    std::strncpy(message, e.what(), room - 1);
    return 1;
  }
}

template <class Args>
int emulate(const Args& a, const How& how, char* message, int room) {
  return guarded(message, room, [&] {
    cuda::check_args(a);
    a.dtype == DType::bf16 ? run<true>(a, how) : run<false>(a, how);
  });
}

// The tile of a kernel, of which there are two.
template <class Use>
auto with_tile(bool compress, const Use& use) {
  return compress ? use(Compress<true>::Tile{}) : use(Mlp<true>::Tile{});
}

}  // namespace

extern "C" {

int emulate_pixel_adaln_mlp(const cuda::PixelAdalnMlpArgs* a, const How* how, char* message,
                            int room) {
  return emulate(*a, *how, message, room);
}
int emulate_pixel_adaln_compress(const cuda::PixelAdalnCompressArgs* a, const How* how,
                                 char* message, int room) {
  return emulate(*a, *how, message, room);
}

// full and empty of the first stage, the number of stages, bytes of shared memory.
void pixel_adaln_memory(int compress, int* out) {
  with_tile(compress, [&](auto tile) {
    using Tile = decltype(tile);
    const uint32_t all[] = {Tile::full(0), Tile::empty(0), Tile::kStages, Tile::kSharedBytes};
    std::copy(std::begin(all), std::end(all), out);
  });
}

// First patch and first pixel of every tile of a cluster, and the number of them.
int pixel_adaln_schedule(int compress, int64_t rows, int64_t pixels, int* out) {
  return with_tile(compress, [&](auto tile) {
    const Schedule schedule = schedule_of<decltype(tile)>(rows, pixels, 64);
    for (int i = 0; out != nullptr && i < schedule.tiles(); ++i) {
      out[2 * i] = schedule.tile(i).row;
      out[2 * i + 1] = schedule.tile(i).pixel;
    }
    return schedule.tiles();
  });
}

// Of a block in a cluster: line, column, masks of its line and column, and the blocks that share
// its patches or its pixels.
void pixel_adaln_cluster(int rank, int* out) {
  const int all[] = {cluster_row(rank), cluster_column(rank), row_mask(rank),  column_mask(rank),
                     sharing(rank, 0),  sharing(rank, 1),     sharing(rank, 2)};
  std::copy(std::begin(all), std::end(all), out);
}

// Of the boxes of a stage's weights, by line and number: offset, first row of an octet, first
// octet; and how many rows, octets and pixels a box has. The number of boxes of a line.
int pixel_adaln_boxes(int compress, int line, int box, int* out) {
  return with_tile(compress, [&](auto tile) {
    using Tile = decltype(tile);
    const int all[] = {static_cast<int>(Tile::weights(0, line, box) - Tile::weights(0)),
                       Tile::box(box).row,
                       Tile::box(box).octet,
                       Tile::kBoxOctetRows,
                       Tile::kBoxOctets,
                       Tile::kBoxPixels};
    std::copy(std::begin(all), std::end(all), out);
    return Tile::kBoxes;
  });
}

// Registers of chunks: of pixel_adaln_mlp by pixel, chunk, half, row, side; of
// pixel_adaln_compress by two pixels, chunk, pair, row, side, and the pixel and channel of a lane.
int pixel_adaln_mlp_value(int pixel, int chunk, int half, int row, int side) {
  return Mlp<true>::Tile::value(pixel, chunk, half, row, side);
}
int pixel_adaln_compress_value(int two, int chunk, int pair, int row, int side) {
  return Compress<true>::Tile::value(two, chunk, pair, row, side);
}
int pixel_adaln_compress_pixel(int lane, int two) { return Compress<true>::Tile::pixel(lane, two); }
int pixel_adaln_compress_channel(int lane) { return Compress<true>::Tile::channel(lane); }

// Encodes the maps of u and of the weight with the given driver; 0, or 1 and a message.
int pixel_adaln_encode(hopper::EncodeTiled driver, int compress, const cuda::PixelAdalnArgs* a,
                       void* u, void* weight, char* message, int room) {
  return guarded(message, room, [&] {
    with_tile(compress, [&](auto tile) {
      using Tile = decltype(tile);
      hopper::encode(driver, "u", patches_map<Tile>(*a), u);
      hopper::encode(driver, "ada_weight", weights_map<Tile>(*a), weight);
    });
  });
}

}  // extern "C"
