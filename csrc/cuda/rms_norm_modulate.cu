// y = x * rsqrt(mean(x^2) + eps) * weight * (1 + scale) + shift, one block per row.
//
// Bytes: 2 * B*N*D * sizeof(x) + 2 * B*D * sizeof(scale). FLOPs: 5 * B*N*D. Bandwidth-bound: the
// row stays in registers between the sum and the product, so memory sees one read and one write.
//
// fp32 inside, one rounding at the end.
#include "rms_norm_modulate.h"

#include "norm_rows.cuh"

namespace pixeldiff::cuda {
namespace {

// W elements of one row: the products, and the store.
template <int W, class T>
__device__ __forceinline__ void finish(const RmsNormModulateArgs& a, int64_t b, int64_t i,
                                       const float (&x)[W], float inverse, T* y) {
  float weight[W], scale[W], shift[W], out[W];
  load_vector(a.weight, 0, i, weight);
  load_vector(a.scale, b, i, scale);
  load_vector(a.shift, b, i, shift);
#pragma unroll
  for (int k = 0; k < W; ++k)
    out[k] = fmaf(x[k] * inverse, weight[k] * (1.0f + scale[k]), shift[k]);
  store(out, y + i);
}

// D % W == 0, everything aligned to W elements, D <= W * kItems * blockDim.x.
template <class T, int W>
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_modulate_vector_kernel(__grid_constant__ const RmsNormModulateArgs a) {
  for (int64_t row = blockIdx.x; row < a.B * a.N; row += gridDim.x) {
    const int64_t b = row / a.N, n = row % a.N;
    const T* x = static_cast<const T*>(a.x.data) + b * a.x.stride_b + n * a.x.stride_n;
    Piece<T, W> kept[kItems];
    float sum = 0.0f;
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const int64_t i = (threadIdx.x + static_cast<int64_t>(item) * blockDim.x) * W;
      if (i < a.D) {
        kept[item] = *reinterpret_cast<const Piece<T, W>*>(x + i);
#pragma unroll
        for (int k = 0; k < W; ++k) {
          const float value = widen(kept[item].v[k]);
          sum = fmaf(value, value, sum);
        }
      }
    }
    const float inverse = inverse_rms(block_sum(sum), a.D, a.eps);
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const int64_t i = (threadIdx.x + static_cast<int64_t>(item) * blockDim.x) * W;
      if (i < a.D) {
        float values[W];
#pragma unroll
        for (int k = 0; k < W; ++k) values[k] = widen(kept[item].v[k]);
        finish(a, b, i, values, inverse, static_cast<T*>(a.y) + row * a.D);
      }
    }
  }
}

// Any D, any alignment; the row is read twice, the second time from cache.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_modulate_any_kernel(__grid_constant__ const RmsNormModulateArgs a) {
  for (int64_t row = blockIdx.x; row < a.B * a.N; row += gridDim.x) {
    const int64_t b = row / a.N, n = row % a.N;
    const T* x = static_cast<const T*>(a.x.data) + b * a.x.stride_b + n * a.x.stride_n;
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < a.D; i += blockDim.x) {
      const float value = widen(x[i]);
      sum = fmaf(value, value, sum);
    }
    const float inverse = inverse_rms(block_sum(sum), a.D, a.eps);
    for (int64_t i = threadIdx.x; i < a.D; i += blockDim.x) {
      const float value[1] = {widen(x[i])};
      finish(a, b, i, value, inverse, static_cast<T*>(a.y) + row * a.D);
    }
  }
}

template <class T>
void launch(const RmsNormModulateArgs& a, cudaStream_t stream) {
  constexpr int W = 16 / sizeof(T);
  const bool vector = a.D % W == 0 && a.D <= W * kItems * kMaxThreads &&
                      is_aligned(a.x, sizeof(T), W) && is_aligned(a.y, 16) &&
                      is_aligned(a.weight, W) && is_aligned(a.scale, W) && is_aligned(a.shift, W);
  const unsigned blocks = blocks_for(a.B * a.N);
  if (vector)
    rms_norm_modulate_vector_kernel<T, W><<<blocks, threads_for(a.D / W), 0, stream>>>(a);
  else
    rms_norm_modulate_any_kernel<T><<<blocks, threads_for(a.D), 0, stream>>>(a);
  check(cudaGetLastError(), "rms_norm_modulate");
}

}  // namespace

void rms_norm_modulate(const RmsNormModulateArgs& a, int device, void* stream) {
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
