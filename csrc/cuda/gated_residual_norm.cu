// x_new = x + gate * y, then h = x_new * rsqrt(mean(x_new^2) + eps) * weight * (1 + scale) + shift,
// one block per row.
//
// Bytes: 4 * B*N*D * sizeof(x) + 3 * B*D * sizeof(scale). FLOPs: 7 * B*N*D. Bandwidth-bound: x_new
// stays in registers between the sum and the product.
//
// fp32 inside. x_new is rounded once and the norm uses the rounded value, as the next op of an
// unfused network would.
#include "gated_residual_norm.h"

#include "norm_rows.cuh"

namespace pixeldiff::cuda {
namespace {

// W elements of one row: x + gate * y in the storage type.
template <int W, class T>
__device__ __forceinline__ Piece<T, W> add_gated(const GatedResidualNormArgs& a, int64_t b,
                                                 int64_t i, const T* x, const T* y) {
  float left[W], right[W], gate[W];
  load(x + i, left);
  load(y + i, right);
  load_vector(a.gate, b, i, gate);
  Piece<T, W> out;
#pragma unroll
  for (int k = 0; k < W; ++k) narrow(fmaf(gate[k], right[k], left[k]), out.v[k]);
  return out;
}

template <int W, class T>
__device__ __forceinline__ void finish(const GatedResidualNormArgs& a, int64_t b, int64_t i,
                                       const Piece<T, W>& x_new, float inverse, T* h) {
  float weight[W], scale[W], shift[W], out[W];
  load_vector(a.weight, 0, i, weight);
  load_vector(a.scale, b, i, scale);
  load_vector(a.shift, b, i, shift);
#pragma unroll
  for (int k = 0; k < W; ++k)
    out[k] = fmaf(widen(x_new.v[k]) * inverse, weight[k] * (1.0f + scale[k]), shift[k]);
  store(out, h + i);
}

template <int W, class T>
__device__ __forceinline__ float add_squares(const Piece<T, W>& piece, float sum) {
#pragma unroll
  for (int k = 0; k < W; ++k) {
    const float value = widen(piece.v[k]);
    sum = fmaf(value, value, sum);
  }
  return sum;
}

// D % W == 0, everything aligned to W elements, D <= W * kItems * blockDim.x.
template <class T, int W>
__global__ void __launch_bounds__(kMaxThreads)
    gated_residual_norm_vector_kernel(__grid_constant__ const GatedResidualNormArgs a) {
  for (int64_t row = blockIdx.x; row < a.B * a.N; row += gridDim.x) {
    const int64_t b = row / a.N, n = row % a.N;
    const T* x = static_cast<const T*>(a.x.data) + b * a.x.stride_b + n * a.x.stride_n;
    const T* y = static_cast<const T*>(a.y.data) + b * a.y.stride_b + n * a.y.stride_n;
    T* x_new = static_cast<T*>(a.x_new) + row * a.D;
    Piece<T, W> kept[kItems];
    float sum = 0.0f;
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const int64_t i = (threadIdx.x + static_cast<int64_t>(item) * blockDim.x) * W;
      if (i < a.D) {
        kept[item] = add_gated<W>(a, b, i, x, y);
        *reinterpret_cast<Piece<T, W>*>(x_new + i) = kept[item];
        sum = add_squares(kept[item], sum);
      }
    }
    const float inverse = inverse_rms(block_sum(sum), a.D, a.eps);
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const int64_t i = (threadIdx.x + static_cast<int64_t>(item) * blockDim.x) * W;
      if (i < a.D) finish(a, b, i, kept[item], inverse, static_cast<T*>(a.h) + row * a.D);
    }
  }
}

// Any D, any alignment. Each thread reads back only what it wrote to x_new itself.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    gated_residual_norm_any_kernel(__grid_constant__ const GatedResidualNormArgs a) {
  for (int64_t row = blockIdx.x; row < a.B * a.N; row += gridDim.x) {
    const int64_t b = row / a.N, n = row % a.N;
    const T* x = static_cast<const T*>(a.x.data) + b * a.x.stride_b + n * a.x.stride_n;
    const T* y = static_cast<const T*>(a.y.data) + b * a.y.stride_b + n * a.y.stride_n;
    T* x_new = static_cast<T*>(a.x_new) + row * a.D;
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < a.D; i += blockDim.x) {
      const Piece<T, 1> piece = add_gated<1>(a, b, i, x, y);
      x_new[i] = piece.v[0];
      sum = add_squares(piece, sum);
    }
    const float inverse = inverse_rms(block_sum(sum), a.D, a.eps);
    for (int64_t i = threadIdx.x; i < a.D; i += blockDim.x)
      finish(a, b, i, Piece<T, 1>{{x_new[i]}}, inverse, static_cast<T*>(a.h) + row * a.D);
  }
}

template <class T>
void launch(const GatedResidualNormArgs& a, cudaStream_t stream) {
  constexpr int W = 16 / sizeof(T);
  const bool vector = a.D % W == 0 && a.D <= W * kItems * kMaxThreads &&
                      is_aligned(a.x, sizeof(T), W) && is_aligned(a.y, sizeof(T), W) &&
                      is_aligned(a.x_new, 16) && is_aligned(a.h, 16) && is_aligned(a.gate, W) &&
                      is_aligned(a.weight, W) && is_aligned(a.scale, W) && is_aligned(a.shift, W);
  const unsigned blocks = blocks_for(a.B * a.N);
  if (vector)
    gated_residual_norm_vector_kernel<T, W><<<blocks, threads_for(a.D / W), 0, stream>>>(a);
  else
    gated_residual_norm_any_kernel<T><<<blocks, threads_for(a.D), 0, stream>>>(a);
  check(cudaGetLastError(), "gated_residual_norm");
}

}  // namespace

void gated_residual_norm(const GatedResidualNormArgs& a, int device, void* stream) {
  const DeviceScope scope(device);
  const auto on = static_cast<cudaStream_t>(stream);
  if (a.dtype == DType::f32)
    launch<float>(a, on);
  else if (a.dtype == DType::bf16)
    launch<__nv_bfloat16>(a, on);
  else
    launch<__half>(a, on);
}

}  // namespace pixeldiff::cuda
