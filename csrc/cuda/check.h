// CUDA's errors as exceptions, and the current device for a scope.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace pixeldiff {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes `device` current for this scope. This library has its own copy of the CUDA runtime, which
// shares contexts, streams and memory with PyTorch's but not its notion of the current device.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceScope() { cudaSetDevice(previous_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace pixeldiff
