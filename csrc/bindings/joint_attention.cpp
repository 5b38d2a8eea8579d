#include "../cpu/joint_attention.h"

#include "arguments.h"
#include "bindings.h"

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

void joint_attention_cpu(AttentionSizes sizes, int dtype, HeadsTuple q, HeadsTuple k, HeadsTuple v,
                         Address o, float scale, MaskTuple key_mask, Address lse, int isa,
                         int threads) {
  const auto [B, L, S, G, d] = sizes;
  const auto [mask, mask_stride_b] = key_mask;
  if (B < 0 || L < 0 || S < 1 || G < 0 || d < 0)
    throw std::invalid_argument("sizes must not be negative, and there must be a key");
  if (B == 0 || L == 0 || G == 0 || d == 0) return;
  const JointAttentionArgs args{B,
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
  const cpu::Isa chosen = to_isa(isa);
  py::gil_scoped_release unlocked;
  cpu::joint_attention(args, chosen, threads);
}

}  // namespace

void bind_joint_attention(py::module_& m) { m.def("joint_attention_cpu", &joint_attention_cpu); }

}  // namespace pixeldiff
