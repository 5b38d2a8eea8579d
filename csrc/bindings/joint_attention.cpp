#include "../cpu/joint_attention.h"

#include "arguments.h"
#include "bindings.h"
#ifdef PIXELDIFF_CUDA
#include "../cuda/joint_attention.h"
#endif

namespace py = pybind11;

namespace pixeldiff {
namespace {

using AttentionSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;  // B, L, S, G, d
using HeadsTuple = std::tuple<Address, int64_t, int64_t, int64_t>;  // data, strides over B, rows, G
using MaskTuple = std::tuple<Address, int64_t>;                     // data or 0, stride over B

Heads to_heads(const char* name, HeadsTuple tuple) {
  const auto [address, stride_b, stride_n, stride_g] = tuple;
  if (address == 0) throw std::invalid_argument(std::string(name) + " has no data");
  return {reinterpret_cast<const void*>(address), stride_b, stride_n, stride_g};
}

bool is_empty(AttentionSizes sizes) {
  const auto [B, L, S, G, d] = sizes;
  if (B < 0 || L < 0 || S < 1 || G < 0 || d < 0)
    throw std::invalid_argument("sizes must not be negative, and there must be a key");
  return B == 0 || L == 0 || G == 0 || d == 0;
}

JointAttentionArgs to_args(AttentionSizes sizes, int dtype, HeadsTuple q, HeadsTuple k,
                           HeadsTuple v, Address o, float scale, MaskTuple key_mask, Address lse) {
  const auto [B, L, S, G, d] = sizes;
  const auto [mask, mask_stride_b] = key_mask;
  return {B,
          L,
          S,
          G,
          d,
          to_dtype(dtype),
          to_heads("q", q),
          to_heads("k", k),
          to_heads("v", v),
          to_output("o", o),
          scale,
          reinterpret_cast<const uint8_t*>(mask),
          mask_stride_b,
          reinterpret_cast<float*>(lse)};
}

void joint_attention_cpu(AttentionSizes sizes, int dtype, HeadsTuple q, HeadsTuple k, HeadsTuple v,
                         Address o, float scale, MaskTuple key_mask, Address lse, int isa,
                         int threads) {
  if (is_empty(sizes)) return;
  const auto args = to_args(sizes, dtype, q, k, v, o, scale, key_mask, lse);
  const cpu::Isa chosen = to_isa(isa);
  py::gil_scoped_release unlocked;
  cpu::joint_attention(args, chosen, threads);
}

#ifdef PIXELDIFF_CUDA
void joint_attention_cuda(AttentionSizes sizes, int dtype, HeadsTuple q, HeadsTuple k, HeadsTuple v,
                          Address o, float scale, MaskTuple key_mask, Address lse, int kernel,
                          int device, Address stream) {
  if (is_empty(sizes)) return;
  const auto args = to_args(sizes, dtype, q, k, v, o, scale, key_mask, lse);
  if (args.dtype == DType::f32) throw std::invalid_argument("fp32 has no such kernel");
  if (args.d % 8 || args.d > 128)
    throw std::invalid_argument("d must be a multiple of 8 up to 128");
  if (kernel < 0 || kernel > 2) throw std::invalid_argument("kernel must be 0, 1 or 2");
  py::gil_scoped_release unlocked;
  cuda::joint_attention(args, static_cast<cuda::AttentionKernel>(kernel), device,
                        reinterpret_cast<void*>(stream));
}

#ifdef PIXELDIFF_SM90
// Bytes of what joint_attention_fp8_cuda is to be given to work in.
int64_t joint_attention_fp8_workspace(AttentionSizes sizes) {
  if (is_empty(sizes)) return 0;
  const auto [B, L, S, G, d] = sizes;
  return cuda::joint_attention_fp8_workspace({B, L, S, G, d});
}

void joint_attention_fp8_cuda(AttentionSizes sizes, int dtype, HeadsTuple q, HeadsTuple k,
                              HeadsTuple v, Address o, float scale, Address workspace, int device,
                              Address stream) {
  if (is_empty(sizes)) return;
  const auto args = to_args(sizes, dtype, q, k, v, o, scale, {0, 0}, 0);
  if (args.d % 8 || args.d > 128)
    throw std::invalid_argument("d must be a multiple of 8 up to 128");
  if (workspace == 0 || workspace % 256)
    throw std::invalid_argument("the workspace must start at a multiple of 256 bytes");
  py::gil_scoped_release unlocked;
  cuda::joint_attention_fp8(args, reinterpret_cast<void*>(workspace), device,
                            reinterpret_cast<void*>(stream));
}
#endif
#endif

}  // namespace

void bind_joint_attention(py::module_& m) {
  m.def("joint_attention_cpu", &joint_attention_cpu);
#ifdef PIXELDIFF_CUDA
  m.def("joint_attention_cuda", &joint_attention_cuda);
#endif
#ifdef PIXELDIFF_SM90
  m.def("joint_attention_fp8_workspace", &joint_attention_fp8_workspace);
  m.def("joint_attention_fp8_cuda", &joint_attention_fp8_cuda);
#endif
}

}  // namespace pixeldiff
