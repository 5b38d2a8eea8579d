// q += gate1 * a, then q += gate2 * mlp(norm_modulate(q)) on sm_90a: chunks 2 to 5 of u W^T + b, in
// the dtype PIXELDIFF_BF16 chooses. The product is pixel_adaln/sm90.h, the rest pixel_adaln/mlp.h.
//
// FLOPs: 2*R*P*P*16*(4*D + 2*F); bytes: q and a read, q written. PiD at 2048 (16384 patches of 256
// pixels, D 1536, F 64): 0.82 + 0.02 TFLOP, 1.06 ms at 798 TFLOP/s; 0.40 GB, 0.13 ms at 3.0 TB/s. a
// is the vendor's product, 0.15 TFLOP, 0.22 ms at 700 TFLOP/s. Both of a step's blocks: 2.5 of 77
// ms.
//
// Counted for a tile of 128 x 128 and D 1536, in clocks of a multiprocessor: tensor cores 12288
// (and 512 for the MLP); shared memory 15400, 48 + 32 KB a step; issue slots 5700, under which fall
// all of the epilogue's, with the other warpgroup's product. From the second-level cache 393 KB,
// 6.4 GB a call, 1.0 ms at 6.4 TB/s. Shared memory is the longest: 1.2 ms on the 128
// multiprocessors that clusters of four fill. Predicted 1.3 ms, and with the vendor's product 1.5:
// 82 % of the floor. Not yet measured. docs/kernels/estimates.md compares it with the Triton kernel
// and says what else was weighed.
#include "check.h"
#include "hopper/device.cuh"
#include "hopper/find_encode_tiled.h"
#include "pixel_adaln/launch_sm90.h"
#include "pixel_adaln/sm90.h"
#include "pixel_adaln_mlp.h"

namespace pixeldiff::pixel_adaln {
namespace {

template <bool kBf16>
__global__ void __launch_bounds__(kThreads, 1)
    pixel_adaln_mlp_sm90_kernel(const __grid_constant__ Schedule schedule,
                                const __grid_constant__ Mlp<kBf16> mlp,
                                const __grid_constant__ CUtensorMap patches,
                                const __grid_constant__ CUtensorMap weights) {
  extern __shared__ char shared[];
  using Tile = typename Mlp<kBf16>::Tile;
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  hopper::Device device((address + Tile::kAlignment - 1) / Tile::kAlignment * Tile::kAlignment);
  Sm90Product<hopper::Device, Tile, Mlp<kBf16>, kBf16>{device, schedule, mlp}.run(patches, weights);
}

}  // namespace
}  // namespace pixeldiff::pixel_adaln

namespace pixeldiff::cuda {

template <bool kBf16>
void launch_pixel_adaln_mlp(const PixelAdalnMlpArgs& a, cudaStream_t stream);

template <>
void launch_pixel_adaln_mlp<PIXELDIFF_BF16>(const PixelAdalnMlpArgs& a, cudaStream_t stream) {
  constexpr const char* kOp = "pixel_adaln_mlp";
  using Tile = typename pixel_adaln::Mlp<PIXELDIFF_BF16>::Tile;
  static const hopper::EncodeTiled driver = hopper::find_encode_tiled();
  const pixel_adaln::Schedule schedule = pixel_adaln::schedule_of<Tile>(a.rows, a.pixels, a.D);
  CUtensorMap patches, weights;
  hopper::encode(driver, "u", pixel_adaln::patches_map<Tile>(a), &patches);
  hopper::encode(driver, "ada_weight", pixel_adaln::weights_map<Tile>(a), &weights);

  const auto kernel = pixel_adaln::pixel_adaln_mlp_sm90_kernel<PIXELDIFF_BF16>;
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes),
      kOp);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {pixel_adaln::kCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = pixel_adaln::kCluster;
  config.blockDim = pixel_adaln::kThreads;
  config.dynamicSmemBytes = Tile::kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  // Those that run at once: a cluster lies within one group of multiprocessors, and not every
  // group's number is a multiple of four. One more would run after all others.
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), kOp);
  if (clusters < 1) throw std::runtime_error("pixel_adaln_mlp: no cluster fits this device");
  if (schedule.tiles() < clusters) clusters = schedule.tiles();
  config.gridDim = pixel_adaln::kCluster * clusters;
  check(cudaLaunchKernelEx(&config, kernel, schedule, pixel_adaln::mlp_of<PIXELDIFF_BF16>(a),
                           patches, weights),
        kOp);
}

}  // namespace pixeldiff::cuda
