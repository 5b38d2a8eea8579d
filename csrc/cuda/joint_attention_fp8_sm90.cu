// o = softmax(scale * q k^T) v with both products in e4m3 on sm_90a.
// The algorithms are attention/quantize_e4m3.h and attention/sm90_e4m3.h; what it must cost and
// why, docs/kernels/attention.md.
//
// FLOPs: 4*B*L*S*G*d; exponentials: B*L*S*G. PiD at 2048 (16684 rows, 24 heads of 64): 1.71 TFLOP,
// 1.07 ms at 1596 TFLOP/s; 6.68 G exponentials, 1.80 ms of the special-function units, 1.58 ms with
// an eighth of them on the FMA units, which are the floor: 22 of a step's 77 ms in 14 calls. Before
// it q is read once, k and v twice, and all three are written once in e4m3: 0.33 GB, 0.11 ms at
// 3.0 TB/s. Not yet measured; predicted 2.4 ms.
#include <type_traits>

#include "attention/e4m3_plan.h"
#include "attention/launch_sm90.h"
#include "attention/sm90.h"
#include "check.h"
#include "hopper/device.cuh"

namespace pixeldiff::attention {
namespace {

#define PIXELDIFF_QUANTIZER(kernel) \
  __global__ void __launch_bounds__(kQuantizeThreads) kernel(const __grid_constant__ QuantizeE4m3 p)

template <DType kType>
PIXELDIFF_QUANTIZER(quantize_statistics_kernel) {
  hopper::Device device(0);
  Quantizer<hopper::Device, kType>{device, p}.statistics();
}
template <DType kType>  // of nothing: all it reads is fp32
PIXELDIFF_QUANTIZER(quantize_totals_kernel) {
  hopper::Device device(0);
  Quantizer<hopper::Device, kType>{device, p}.totals();
}
template <DType kType, int kLanes>
PIXELDIFF_QUANTIZER(quantize_queries_kernel) {
  hopper::Device device(0);
  Quantizer<hopper::Device, kType>{device, p}.template queries<kLanes>();
}
template <DType kType, int kLanes>
PIXELDIFF_QUANTIZER(quantize_keys_kernel) {
  hopper::Device device(0);
  Quantizer<hopper::Device, kType>{device, p}.template keys<kLanes>();
}
template <DType kType>
PIXELDIFF_QUANTIZER(quantize_values_kernel) {
  hopper::Device device(0);
  Quantizer<hopper::Device, kType>{device, p}.values();
}

#undef PIXELDIFF_QUANTIZER

template <int kChannels>
__global__ void __launch_bounds__(kThreads, 1)
    joint_attention_fp8_sm90_kernel(const __grid_constant__ Sm90E4m3Params p,
                                    const __grid_constant__ CUtensorMap q_map,
                                    const __grid_constant__ CUtensorMap k_map,
                                    const __grid_constant__ CUtensorMap v_map) {
  extern __shared__ char shared[];
  constexpr uint32_t kAlignment = Sm90E4m3Tile<kChannels>::kAlignment;
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  hopper::Device device((address + kAlignment - 1) / kAlignment * kAlignment);
  Sm90Attention<hopper::Device, Sm90E4m3<kChannels>>{device, p}.run(q_map, k_map, v_map);
}

constexpr const char* kOp = "joint_attention_fp8";

template <DType kType, int kLanes>
void quantize(const E4m3Plan& plan, cudaStream_t stream) {
  const auto run = [&](auto kernel, int64_t threads) {
    const auto blocks = static_cast<unsigned>((threads + kQuantizeThreads - 1) / kQuantizeThreads);
    kernel<<<blocks, kQuantizeThreads, 0, stream>>>(plan.quantize);
    check(cudaGetLastError(), kOp);
  };
  run(quantize_statistics_kernel<kType>, plan.statistics);
  run(quantize_totals_kernel<DType::f32>, plan.totals);
  run(quantize_queries_kernel<kType, kLanes>, plan.queries);
  run(quantize_keys_kernel<kType, kLanes>, plan.keys);
  run(quantize_values_kernel<kType>, plan.values);
}

template <int kChannels>
void attend(const E4m3Plan& plan, hopper::EncodeTiled driver, int multiprocessors,
            cudaStream_t stream) {
  using Tile = Sm90E4m3Tile<kChannels>;
  const auto map = [&](const char* name, const hopper::TensorMapSpec& spec) {
    CUtensorMap encoded;
    hopper::encode(driver, name, spec, &encoded);
    return encoded;
  };
  const QuantizeE4m3& made = plan.quantize;
  const CUtensorMap q = map("q", rows_map_e4m3<Tile>(made, made.q8, made.L));
  const CUtensorMap k = map("k", rows_map_e4m3<Tile>(made, made.k8, made.S));
  const CUtensorMap v = map("v", values_map_e4m3<Tile>(made));
  check(cudaFuncSetAttribute(joint_attention_fp8_sm90_kernel<kChannels>,
                             cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes),
        kOp);
  const int tiles = plan.attend.schedule.tiles();
  const int blocks = tiles < multiprocessors ? tiles : multiprocessors;
  joint_attention_fp8_sm90_kernel<kChannels>
      <<<blocks, kThreads, Tile::kSharedBytes, stream>>>(plan.attend, q, k, v);
  check(cudaGetLastError(), kOp);
}

}  // namespace

void launch_e4m3_sm90(const JointAttentionArgs& a, char* workspace, hopper::EncodeTiled driver,
                      int multiprocessors, cudaStream_t stream) {
  const E4m3Plan plan = plan_e4m3(a, workspace);
  const auto with_lanes = [&](auto lanes) {
    constexpr int kLanes = decltype(lanes)::value;
    if (a.dtype == DType::f32)
      quantize<DType::f32, kLanes>(plan, stream);
    else if (a.dtype == DType::bf16)
      quantize<DType::bf16, kLanes>(plan, stream);
    else
      quantize<DType::f16, kLanes>(plan, stream);
  };
  if (lanes_of(a.d) == 8)
    with_lanes(std::integral_constant<int, 8>{});
  else
    with_lanes(std::integral_constant<int, 16>{});
  if (a.d <= 64)
    attend<64>(plan, driver, multiprocessors, stream);
  else if (a.d <= 80)
    attend<80>(plan, driver, multiprocessors, stream);
  else
    attend<128>(plan, driver, multiprocessors, stream);
}

}  // namespace pixeldiff::attention
