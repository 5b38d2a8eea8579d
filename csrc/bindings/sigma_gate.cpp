#include "../cpu/sigma_gate.h"

#include "arguments.h"
#include "bindings.h"

namespace pixeldiff {
namespace {

DType to_logit_dtype(int code, DType stream) {
  const DType dtype = to_dtype(code);
  if (dtype != DType::f32 && dtype != stream)
    throw std::invalid_argument("lq_logit must be fp32 or of the dtype of x");
  return dtype;
}

void sigma_gate_per_token_cpu(Sizes sizes, int dtype, RowsTuple x, RowsTuple feature,
                              VectorTuple weight, RowsTuple lq_logit, int logit_dtype, Address y,
                              int isa, int threads) {
  if (is_empty(sizes)) return;
  const auto [B, N, D] = sizes;
  const SigmaGatePerTokenArgs args{B,
                                   N,
                                   D,
                                   to_dtype(dtype),
                                   to_rows("x", x),
                                   to_rows("feature", feature),
                                   to_vector("weight", weight),
                                   to_rows("lq_logit", lq_logit),
                                   to_logit_dtype(logit_dtype, to_dtype(dtype)),
                                   to_output("y", y)};
  const cpu::Isa chosen = to_isa(isa);
  pybind11::gil_scoped_release unlocked;
  cpu::sigma_gate_per_token(args, chosen, threads);
}

void sigma_gate_per_channel_cpu(Sizes sizes, int dtype, RowsTuple x, RowsTuple feature,
                                RowsTuple product, RowsTuple lq_logit, int logit_dtype, Address y,
                                int isa, int threads) {
  if (is_empty(sizes)) return;
  const auto [B, N, D] = sizes;
  const SigmaGatePerChannelArgs args{B,
                                     N,
                                     D,
                                     to_dtype(dtype),
                                     to_rows("x", x),
                                     to_rows("feature", feature),
                                     to_rows("product", product),
                                     to_rows("lq_logit", lq_logit),
                                     to_logit_dtype(logit_dtype, to_dtype(dtype)),
                                     to_output("y", y)};
  const cpu::Isa chosen = to_isa(isa);
  pybind11::gil_scoped_release unlocked;
  cpu::sigma_gate_per_channel(args, chosen, threads);
}

}  // namespace

void bind_sigma_gate(pybind11::module_& m) {
  m.def("sigma_gate_per_token_cpu", &sigma_gate_per_token_cpu);
  m.def("sigma_gate_per_channel_cpu", &sigma_gate_per_channel_cpu);
}

}  // namespace pixeldiff
