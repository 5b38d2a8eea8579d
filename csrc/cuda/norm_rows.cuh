// What the rms_norm_modulate and gated_residual_norm kernels share: converting vector loads and
// stores, the block-wide sum, and the launch shape. One block works on one row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../dtype.h"
#include "check.h"

namespace pixeldiff::cuda {

constexpr int kItems = 4;         // 16-byte pieces a thread keeps in registers
constexpr int kMaxThreads = 512;  // leaves 128 registers a thread: the kept pieces do not spill

__device__ __forceinline__ float widen(float a) { return a; }
__device__ __forceinline__ float widen(__nv_bfloat16 a) { return __bfloat162float(a); }
__device__ __forceinline__ float widen(__half a) { return __half2float(a); }
__device__ __forceinline__ void narrow(float a, float& out) { out = a; }
__device__ __forceinline__ void narrow(float a, __nv_bfloat16& out) {
  out = __float2bfloat16_rn(a);
}
__device__ __forceinline__ void narrow(float a, __half& out) { out = __float2half_rn(a); }

template <class T, int W>
struct alignas(sizeof(T) * W) Piece {
  T v[W];
};

template <int W, class T>
__device__ __forceinline__ void load(const T* p, float (&out)[W]) {
  const Piece<T, W> piece = *reinterpret_cast<const Piece<T, W>*>(p);
#pragma unroll
  for (int i = 0; i < W; ++i) out[i] = widen(piece.v[i]);
}

// W elements of a per-channel vector of any storage type. The branch is the same for every thread.
template <int W>
__device__ __forceinline__ void load_vector(const Vector& vector, int64_t b, int64_t i,
                                            float (&out)[W]) {
  const int64_t at = b * vector.stride_b + i;
  if (vector.data == nullptr) {
#pragma unroll
    for (int k = 0; k < W; ++k) out[k] = 0.0f;
  } else if (vector.dtype == DType::f32) {
    // Two loads of 16 bytes where W is 8: the hardware has no wider one on every target.
    if constexpr (W == 8) {
      float low[4], high[4];
      load(static_cast<const float*>(vector.data) + at, low);
      load(static_cast<const float*>(vector.data) + at + 4, high);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        out[k] = low[k];
        out[k + 4] = high[k];
      }
    } else {
      load(static_cast<const float*>(vector.data) + at, out);
    }
  } else if (vector.dtype == DType::bf16) {
    load(static_cast<const __nv_bfloat16*>(vector.data) + at, out);
  } else {
    load(static_cast<const __half*>(vector.data) + at, out);
  }
}

template <int W, class T>
__device__ __forceinline__ void store(const float (&in)[W], T* p) {
  Piece<T, W> piece;
#pragma unroll
  for (int i = 0; i < W; ++i) narrow(in[i], piece.v[i]);
  *reinterpret_cast<Piece<T, W>*>(p) = piece;
}

// Sum over the block, the same value in every thread, in an order that depends on blockDim alone.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float partial[32];
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffff, value, lane);
  const int warps = blockDim.x / 32;
  __syncthreads();  // the previous row's partial sums have been read
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  value = static_cast<int>(threadIdx.x % 32) < warps ? partial[threadIdx.x % 32] : 0.0f;
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffff, value, lane);
  return value;
}

// 1 / sqrt(sum / D + eps), each step correctly rounded.
__device__ __forceinline__ float inverse_rms(float sum, int64_t D, float eps) {
  return __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(sum, static_cast<float>(D)) + eps));
}

inline bool is_aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// Whether W elements at a time can be loaded from every row of `rows`, or image of `vector`.
inline bool is_aligned(const Rows& rows, int64_t element_bytes, int W) {
  return is_aligned(rows.data, element_bytes * W) && rows.stride_b % W == 0 &&
         rows.stride_n % W == 0;
}
inline bool is_aligned(const Vector& vector, int W) {
  const int64_t bytes = vector.dtype == DType::f32 ? 16 : 2 * W;
  return vector.data == nullptr || (is_aligned(vector.data, bytes) && vector.stride_b % W == 0);
}

// Threads for a row of `pieces` pieces: two pieces each while a block has room, whole warps.
inline int threads_for(int64_t pieces) {
  const int64_t wanted = ((pieces + 1) / 2 + 31) / 32 * 32;
  return static_cast<int>(wanted < 32 ? 32 : wanted > kMaxThreads ? kMaxThreads : wanted);
}

inline unsigned blocks_for(int64_t rows) {
  constexpr int64_t kMaxBlocks = 0x7fffffff;  // the grid's limit; the kernels loop over rows
  return static_cast<unsigned>(rows < kMaxBlocks ? rows : kMaxBlocks);
}

}  // namespace pixeldiff::cuda
