// skip = silu(conv3x3(x) + bias) and its 2x2 maximum in bf16, of three channels to 16, or of an
// fp32 image to three, on sm_80 and later. The algorithm is local_decoder/down.h.
//
// Bytes: B*H*W*(3*sizeof(x) + 2.5*Co); FLOPs: 54*Co*B*H*W. L2P at 8192, level 0, an image to three:
// 1.31 GB, 0.44 ms at 3.0 TB/s, 0.011 TFLOP; level 1, to 16: 0.77 GB, 0.26 ms, 0.014 TFLOP; at
// 10240 2.04 and 1.21 GB, 0.68 and 0.40 ms; level 0 of 4096, an image to 16: 0.87 GB, 0.29 ms, 0.4
// % of a step's 77 ms. docs/kernels/estimates.md counts the other units and says what else was
// weighed.
#include "local_decoder_down.h"

#include "ampere/device.cuh"
#include "check.h"
#include "local_decoder/launch.cuh"
#include "local_decoder/launch_down.h"

namespace pixeldiff::local_decoder {
namespace {

template <bool kPlanes, int kChannels>
__global__ void __launch_bounds__(DownTile<kPlanes, kChannels>::kThreads,
                                  DownTile<kPlanes, kChannels>::kBlocks)
    local_decoder_down_kernel(const __grid_constant__ DownParams p) {
  extern __shared__ __align__(128) char shared[];
  ampere::Device device(static_cast<uint32_t>(__cvta_generic_to_shared(shared)));
  Down<ampere::Device, kPlanes, kChannels>{device, p}.run(p.schedule.segment(blockIdx.x));
}

template <bool kPlanes, int kChannels>
void launch(const cuda::LocalDecoderDownArgs& a, int device, cudaStream_t stream) {
  using Tile = DownTile<kPlanes, kChannels>;
  constexpr const char* kOp = "local_decoder_down";
  const auto kernel = local_decoder_down_kernel<kPlanes, kChannels>;
  const DownParams params = down_params(a, Tile::kColumns, slots<Tile>(kernel, device, kOp));
  kernel<<<params.schedule.blocks(), Tile::kThreads, Tile::kSharedBytes, stream>>>(params);
  check(cudaGetLastError(), kOp);
}

}  // namespace
}  // namespace pixeldiff::local_decoder

namespace pixeldiff::cuda {

void local_decoder_down(const LocalDecoderDownArgs& a, int device, void* stream) {
  check_args(a);
  const DeviceScope scope(device);
  // check_args: of fewer channels x is in planes.
  using namespace local_decoder;
  const auto run = a.Co == kPackedChannels   ? launch<true, kPackedChannels>
                   : a.x_dtype == DType::f32 ? launch<true, kOut>
                                             : launch<false, kOut>;
  run(a, device, static_cast<cudaStream_t>(stream));
}

}  // namespace pixeldiff::cuda
