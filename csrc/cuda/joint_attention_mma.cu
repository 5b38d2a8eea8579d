// o = softmax(scale * q k^T) v and its log-sum-exp on sm_80 and later, in the dtype PIXELDIFF_BF16
// chooses. The algorithm is attention/mma.h; what it must cost and why, docs/kernels/attention.md.
//
// FLOPs: 4*B*L*S*G*d; exponentials: B*L*S*G; bytes: 2*(2*B*L + 2*B*S)*G*d. PiD at 2048 (16684 rows,
// 24 heads of 64): 1.71 TFLOP, 5.5 ms on an A100 (312 TFLOP/s), 10.4 ms on an RTX 4090 (165), 8.2
// ms on an RTX 5090 (209); 6.68 G exponentials, 2.7, 1.3 and 1.0 ms. Compute bound; 14 calls a
// step. Not yet measured; predicted 9.0, 11.5 and 9.0 ms.
#include "ampere/device.cuh"
#include "attention/launch_mma.h"
#include "attention/mma.h"
#include "check.h"
#include "hopper/tensor_map.h"

namespace pixeldiff::attention {
namespace {

template <int kChannels, bool kBf16>
__global__ void __launch_bounds__(MmaTile<kChannels>::kThreads, MmaTile<kChannels>::kBlocks)
    joint_attention_mma_kernel(const __grid_constant__ MmaParams p) {
  extern __shared__ char shared[];
  constexpr uint32_t kAlignment = MmaTile<kChannels>::kAlignment;
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  ampere::Device device((address + kAlignment - 1) / kAlignment * kAlignment);
  MmaAttention<ampere::Device, kChannels, kBf16>{device, p}.run();
}

template <int kChannels, bool kBf16>
void launch(const JointAttentionArgs& a, cudaStream_t stream) {
  using Tile = MmaTile<kChannels>;
  const auto count = [](int64_t n) { return static_cast<int>(n); };
  const MmaParams params{
      {count(a.B), count(a.L), count(a.S), count(a.G), Tile::kQueries, Tile::kKeys},
      a.q,
      a.k,
      a.v,
      {count(a.d), a.o, a.lse},
      a.key_mask,
      a.mask_stride_b,
      a.scale,
      a.scale * 1.4426950408889634f};
  // What cp.async reads is what the copy engine reads.
  const auto demand = [&](const char* name, const Heads& t, int64_t rows) {
    const auto spec = hopper::heads_map(t, kBf16, a.B, rows, a.G, a.d, 64, 64);
    if (const char* reason = hopper::why_not(spec))
      throw std::invalid_argument(std::string(name) + " " + reason);
  };
  demand("q", a.q, a.L);
  demand("k", a.k, a.S);
  demand("v", a.v, a.S);
  const auto kernel = joint_attention_mma_kernel<kChannels, kBf16>;
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes),
      "joint_attention");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared),
        "joint_attention");
  kernel<<<params.schedule.tiles(), Tile::kThreads, Tile::kSharedBytes, stream>>>(params);
  check(cudaGetLastError(), "joint_attention");
}

}  // namespace

template <>
void launch_mma<PIXELDIFF_BF16>(const JointAttentionArgs& a, cudaStream_t stream) {
  if (a.d <= 64)
    launch<64, PIXELDIFF_BF16>(a, stream);
  else if (a.d <= 80)
    launch<80, PIXELDIFF_BF16>(a, stream);
  else
    launch<128, PIXELDIFF_BF16>(a, stream);
}

}  // namespace pixeldiff::attention
