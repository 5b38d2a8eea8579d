// o = softmax(scale * q k^T) v and its log-sum-exp on sm_90a, in the dtype PIXELDIFF_BF16 chooses.
// The algorithm is attention/sm90.h; what it must cost and why, docs/kernels/attention.md.
//
// FLOPs: 4*B*L*S*G*d; exponentials: B*L*S*G; bytes: 2*(2*B*L + 2*B*S)*G*d. PiD at 2048 (16684 rows,
// 24 heads of 64): 1.71 TFLOP, 2.14 ms at 798 TFLOP/s; 6.68 G exponentials, 1.80 ms of the special
// function units, 1.58 ms with an eighth of them on the FMA units; 0.21 GB, 0.07 ms at 3.0 TB/s.
// Compute bound; 14 calls are 30 of a step's 77 ms. Not yet measured; predicted 3.0 ms, 570
// TFLOP/s.
#include "attention/launch_sm90.h"
#include "attention/sm90.h"
#include "attention/sm90_half.h"
#include "check.h"
#include "hopper/device.cuh"

namespace pixeldiff::attention {
namespace {

template <int kChannels, bool kBf16>
__global__ void __launch_bounds__(kThreads, 1)
    joint_attention_sm90_kernel(const __grid_constant__ Sm90Params p,
                                const __grid_constant__ CUtensorMap q_map,
                                const __grid_constant__ CUtensorMap k_map,
                                const __grid_constant__ CUtensorMap v_map) {
  extern __shared__ char shared[];
  constexpr uint32_t kAlignment = Sm90Tile<kChannels>::kAlignment;
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  hopper::Device device((address + kAlignment - 1) / kAlignment * kAlignment);
  Sm90Attention<hopper::Device, Sm90Half<kChannels, kBf16>>{device, p}.run(q_map, k_map, v_map);
}

template <int kChannels, bool kBf16>
void launch(const JointAttentionArgs& a, hopper::EncodeTiled driver, int multiprocessors,
            cudaStream_t stream) {
  using Tile = Sm90Tile<kChannels>;
  const auto count = [](int64_t n) { return static_cast<int>(n); };
  const Sm90Params params{{count(a.B), count(a.L), count(a.S), count(a.G), kQueries, kKeys},
                          count(a.d),
                          a.o,
                          a.lse,
                          a.key_mask,
                          a.mask_stride_b,
                          a.scale,
                          a.scale * 1.4426950408889634f};
  const auto map = [&](const char* name, const Heads& t, int64_t rows) {
    CUtensorMap encoded;
    const auto spec = hopper::heads_map(t, kBf16, a.B, rows, a.G, a.d, Tile::kPanel, kKeys);
    hopper::encode(driver, name, spec, &encoded);
    return encoded;
  };
  const CUtensorMap q = map("q", a.q, a.L), k = map("k", a.k, a.S), v = map("v", a.v, a.S);
  check(cudaFuncSetAttribute(joint_attention_sm90_kernel<kChannels, kBf16>,
                             cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes),
        "joint_attention");
  const int tiles = params.schedule.tiles();
  const int blocks = tiles < multiprocessors ? tiles : multiprocessors;
  joint_attention_sm90_kernel<kChannels, kBf16>
      <<<blocks, kThreads, Tile::kSharedBytes, stream>>>(params, q, k, v);
  check(cudaGetLastError(), "joint_attention");
}

}  // namespace

template <>
void launch_sm90<PIXELDIFF_BF16>(const JointAttentionArgs& a, hopper::EncodeTiled driver,
                                 int multiprocessors, cudaStream_t stream) {
  if (a.d <= 64)
    launch<64, PIXELDIFF_BF16>(a, driver, multiprocessors, stream);
  else if (a.d <= 80)
    launch<80, PIXELDIFF_BF16>(a, driver, multiprocessors, stream);
  else
    launch<128, PIXELDIFF_BF16>(a, driver, multiprocessors, stream);
}

}  // namespace pixeldiff::attention
