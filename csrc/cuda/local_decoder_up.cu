// y = silu(conv3x3([u, skip]) + bias), u = conv3x3(x doubled) + up_bias, for few channels in bf16
// on sm_80 and later. The algorithm is local_decoder/up.h.
//
// Bytes: H*W*(B*Ci/4 + S*Cs + B*Co)*2; FLOPs: 18*H*W*Co*(B*Ci + S*Cs), as one convolution of x. L2P
// at 4096, level 0 (16 channels): 1.21 GB, 0.40 ms at 3.0 TB/s, 0.15 TFLOP, 0.31 ms at what
// mma.sync has of 798 TFLOP/s; level 1 (32): 0.47 GB, 0.16 ms, 0.08 TFLOP, 0.16 ms. Together 0.6 of
// a step's 77 ms. Predicted 0.49 and 0.22 ms; not yet measured. At 8192, level 0 (x 16, skip 3):
// 3.09 GB, 1.03 ms, 0.37 TFLOP, 0.83 ms in products of 16 values for nine; predicted 1.35 ms.
// docs/kernels/estimates.md counts the other units and says what else was weighed.
#include "local_decoder_up.h"

#include "ampere/device.cuh"
#include "check.h"
#include "local_decoder/launch.cuh"
#include "local_decoder/launch_up.h"

namespace pixeldiff::local_decoder {
namespace {

constexpr const char* kOp = "local_decoder_up";

template <int kXBlocks, int kSkipBlocks>
__global__ void __launch_bounds__(UpTile<kXBlocks, kSkipBlocks>::kThreads,
                                  UpTile<kXBlocks, kSkipBlocks>::kBlocks)
    local_decoder_up_kernel(const __grid_constant__ UpParams p) {
  extern __shared__ __align__(128) char shared[];
  ampere::Device device(static_cast<uint32_t>(__cvta_generic_to_shared(shared)));
  // What all threads of a block have in common is computed once where the compiler sees that it is.
  Up<ampere::Device, kXBlocks, kSkipBlocks>{device, p}.run(p.schedule.segment(blockIdx.x));
}

__global__ void __launch_bounds__(Compose<ampere::Device>::kThreads)
    local_decoder_up_compose_kernel(const __grid_constant__ ComposeParams p) {
  __shared__ __align__(128) char shared[Compose<ampere::Device>::kSharedBytes];
  ampere::Device device(static_cast<uint32_t>(__cvta_generic_to_shared(shared)));
  Compose<ampere::Device>{device, p}.run();
}

template <int kXBlocks, int kSkipBlocks>
void launch(const cuda::LocalDecoderUpArgs& a, int device, cudaStream_t stream) {
  using Tile = UpTile<kXBlocks, kSkipBlocks>;
  const auto kernel = local_decoder_up_kernel<kXBlocks, kSkipBlocks>;
  const UpParams params = up_params(a, Tile::kColumns, slots<Tile>(kernel, device, kOp));
  kernel<<<params.schedule.blocks(), Tile::kThreads, Tile::kSharedBytes, stream>>>(params);
  check(cudaGetLastError(), kOp);
}

}  // namespace
}  // namespace pixeldiff::local_decoder

namespace pixeldiff::cuda {

int64_t local_decoder_up_workspace(int64_t Ci, int64_t Cs) {
  return local_decoder::weights_of(Ci, Cs).bytes();
}

void local_decoder_up(const LocalDecoderUpArgs& a, int device, void* stream) {
  using namespace local_decoder;
  check_args(a);
  const DeviceScope scope(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const ComposeParams compose = compose_params(a);
  local_decoder_up_compose_kernel<<<compose.blocks(), Compose<ampere::Device>::kThreads, 0, on>>>(
      compose);
  check(cudaGetLastError(), kOp);
  const Weights layout = weights_of(a.Ci, a.Cs);
  const auto run = layout.x_blocks == 1 ? (layout.skip_blocks == 0   ? launch<1, 0>
                                           : layout.skip_blocks == 1 ? launch<1, 1>
                                                                     : launch<1, 2>)
                                        : (layout.skip_blocks == 0   ? launch<2, 0>
                                           : layout.skip_blocks == 1 ? launch<2, 1>
                                                                     : launch<2, 2>);
  run(a, device, on);
}

}  // namespace pixeldiff::cuda
