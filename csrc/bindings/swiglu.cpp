#include "../cpu/swiglu.h"

#include "arguments.h"
#include "bindings.h"

namespace pixeldiff {
namespace {

void swiglu_cpu(Sizes sizes, int dtype, RowsTuple a, RowsTuple b, Address y, int isa, int threads) {
  if (is_empty(sizes)) return;
  const auto [B, N, D] = sizes;
  const SwigluArgs args{
      B, N, D, to_dtype(dtype), to_rows("a", a), to_rows("b", b), to_output("y", y)};
  const cpu::Isa chosen = to_isa(isa);
  pybind11::gil_scoped_release unlocked;
  cpu::swiglu(args, chosen, threads);
}

}  // namespace

void bind_swiglu(pybind11::module_& m) { m.def("swiglu_cpu", &swiglu_cpu); }

}  // namespace pixeldiff
