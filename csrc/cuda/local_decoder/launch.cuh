// Launching a kernel whose blocks walk down strips: with as many segments as run at once.
#pragma once

#include "../check.h"

namespace pixeldiff::local_decoder {

// Blocks of a kernel that run at once on the current device.
template <class Tile, class Kernel>
int slots(Kernel kernel, int device, const char* op) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared),
        op);
  int blocks = 0, multiprocessors = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, Tile::kThreads,
                                                      Tile::kSharedBytes),
        op);
  if (blocks < 1) throw std::runtime_error(std::string(op) + ": no block fits this device");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), op);
  return blocks * multiprocessors;
}

}  // namespace pixeldiff::local_decoder
