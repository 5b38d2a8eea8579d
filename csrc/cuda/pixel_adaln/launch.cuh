// A pixel_adaln kernel on the GPU: its body, and its launch in clusters.
#pragma once

#include <stdexcept>
#include <string>

#include "../check.h"
#include "../hopper/device.cuh"
#include "../hopper/find_encode_tiled.h"
#include "launch_sm90.h"
#include "sm90.h"

namespace pixeldiff::pixel_adaln {

template <bool kBf16, class Epilogue>
__device__ __forceinline__ void run_product(const Schedule& schedule, const Epilogue& epilogue,
                                            const CUtensorMap& patches,
                                            const CUtensorMap& weights) {
  extern __shared__ char shared[];
  using Tile = typename Epilogue::Tile;
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  hopper::Device device((address + Tile::kAlignment - 1) / Tile::kAlignment * Tile::kAlignment);
  Sm90Product<hopper::Device, Tile, Epilogue, kBf16>{device, schedule, epilogue}.run(patches,
                                                                                     weights);
}

template <class Epilogue>
void launch(const char* op, void (*kernel)(Schedule, Epilogue, CUtensorMap, CUtensorMap),
            const cuda::PixelAdalnArgs& a, const Epilogue& epilogue, cudaStream_t stream) {
  using Tile = typename Epilogue::Tile;
  static const hopper::EncodeTiled driver = hopper::find_encode_tiled();
  const Schedule schedule = schedule_of<Tile>(a.rows, a.pixels, a.D);
  CUtensorMap patches, weights;
  hopper::encode(driver, "u", patches_map<Tile>(a), &patches);
  hopper::encode(driver, "ada_weight", weights_map<Tile>(a), &weights);

  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes),
      op);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = kCluster;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = Tile::kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  // Those that run at once: a cluster lies within one group of multiprocessors, and not every
  // group's number is a multiple of four. One more would run after all others.
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), op);
  if (clusters < 1) throw std::runtime_error(std::string(op) + ": no cluster fits this device");
  if (schedule.tiles() < clusters) clusters = schedule.tiles();
  config.gridDim = kCluster * clusters;
  check(cudaLaunchKernelEx(&config, kernel, schedule, epilogue, patches, weights), op);
}

}  // namespace pixeldiff::pixel_adaln
