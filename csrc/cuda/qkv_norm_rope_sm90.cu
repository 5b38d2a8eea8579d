// q, k and v of text and image rows, projected, normalised, rotated and laid into one joint buffer,
// on sm_90a, in the dtype PIXELDIFF_BF16 chooses. The algorithm is qkv/sm90.h; why it is a product
// of our own with an epilogue, docs/kernels/qkv.md.
//
// FLOPs: 2*B*(T+N)*K*3*G*d; bytes: 2*(B*(T+N)*(K + 3*G*d) + 2*3*G*d*K). PiD at 2048 (16684 rows, K
// 1536, 24 heads of 64): 0.236 TFLOP, 0.30 ms at 798 TFLOP/s; 0.23 GB, 0.08 ms at 3.0 TB/s. Compute
// bound; 14 calls are 5.1 of a step's 77 ms, where the vendor's product and a kernel after it are
// 6.2. Not yet measured; predicted 0.366 ms, 645 TFLOP/s.
#include "check.h"
#include "hopper/device.cuh"
#include "qkv/launch_sm90.h"
#include "qkv/maps.h"
#include "qkv/params.h"

namespace pixeldiff::qkv {
namespace {

template <int kHeadDim, bool kBf16>
__global__ void __launch_bounds__(kThreads, 1)
    qkv_norm_rope_sm90_kernel(const __grid_constant__ Sm90Params p,
                              const __grid_constant__ CUtensorMap x,
                              const __grid_constant__ CUtensorMap weight,
                              const __grid_constant__ CUtensorMap text_x,
                              const __grid_constant__ CUtensorMap text_weight) {
  extern __shared__ char shared[];
  using Columns = ColumnsOf<kHeadDim>;
  constexpr uint32_t kAlignment = Sm90Tile<Columns>::kAlignment;
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  hopper::Device device((address + kAlignment - 1) / kAlignment * kAlignment);
  Sm90Projection<hopper::Device, Columns, kBf16>{device, p}.run(x, weight, text_x, text_weight);
}

template <int kHeadDim, bool kBf16>
void launch(const QkvNormRopeArgs& a, hopper::EncodeTiled driver, int multiprocessors,
            cudaStream_t stream) {
  using Columns = ColumnsOf<kHeadDim>;
  using Tile = Sm90Tile<Columns>;
  const Sm90Params p = params<Columns>(a);
  const auto encoded = [&](const char* name, const hopper::TensorMapSpec& spec) {
    CUtensorMap map;
    hopper::encode(driver, name, spec, &map);
    return map;
  };
  // Of a stream without rows there is nothing to read: its maps are the other's.
  const QkvStream& image = a.image.rows ? a.image : a.text;
  const QkvStream& text = a.text.rows ? a.text : a.image;
  const CUtensorMap x = encoded("x", x_map(a, image)), text_x = encoded("text x", x_map(a, text));
  const CUtensorMap weight = encoded("weight", weight_map<Columns>(a, image)),
                    text_weight = encoded("text weight", weight_map<Columns>(a, text));
  check(cudaFuncSetAttribute(qkv_norm_rope_sm90_kernel<kHeadDim, kBf16>,
                             cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes),
        "qkv_norm_rope");
  const int tiles = p.schedule.tiles();
  const int blocks = tiles < multiprocessors ? tiles : multiprocessors;
  qkv_norm_rope_sm90_kernel<kHeadDim, kBf16>
      <<<blocks, kThreads, Tile::kSharedBytes, stream>>>(p, x, weight, text_x, text_weight);
  check(cudaGetLastError(), "qkv_norm_rope");
}

}  // namespace

template <>
void launch_sm90<PIXELDIFF_BF16>(const QkvNormRopeArgs& a, hopper::EncodeTiled driver,
                                 int multiprocessors, cudaStream_t stream) {
  if (a.d == 64)
    launch<64, PIXELDIFF_BF16>(a, driver, multiprocessors, stream);
  else if (a.d == 72)
    launch<72, PIXELDIFF_BF16>(a, driver, multiprocessors, stream);
  else
    launch<128, PIXELDIFF_BF16>(a, driver, multiprocessors, stream);
}

}  // namespace pixeldiff::qkv
