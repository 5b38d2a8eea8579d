#include "../cpu/gated_norm_residual.h"

#include "arguments.h"
#include "bindings.h"

namespace pixeldiff {
namespace {

void gated_norm_residual_cpu(Sizes sizes, int dtype, RowsTuple x, RowsTuple y, VectorTuple weight,
                             VectorTuple gate, Address r, float eps, int isa, int threads) {
  if (is_empty(sizes)) return;
  const auto [B, N, D] = sizes;
  const GatedNormResidualArgs args{B,
                                   N,
                                   D,
                                   to_dtype(dtype),
                                   to_rows("x", x),
                                   to_rows("y", y),
                                   to_vector("weight", weight),
                                   to_vector("gate", gate, true),
                                   to_output("r", r),
                                   eps};
  const cpu::Isa chosen = to_isa(isa);
  pybind11::gil_scoped_release unlocked;
  cpu::gated_norm_residual(args, chosen, threads);
}

}  // namespace

void bind_gated_norm_residual(pybind11::module_& m) {
  m.def("gated_norm_residual_cpu", &gated_norm_residual_cpu);
}

}  // namespace pixeldiff
