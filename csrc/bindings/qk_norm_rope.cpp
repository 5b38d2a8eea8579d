#include "../cpu/qk_norm_rope.h"

#include "arguments.h"
#include "bindings.h"

namespace py = pybind11;

namespace pixeldiff {
namespace {

using HeadSizes = std::tuple<int64_t, int64_t, int64_t>;  // B, G, d
using TableTuple = std::tuple<Address, int64_t>;          // data, stride over rows
// rows, qkv, q_weight, k_weight, cos, sin
using StreamTuple =
    std::tuple<int64_t, RowsTuple, VectorTuple, VectorTuple, TableTuple, TableTuple>;

QkNormRopeStream to_stream(const StreamTuple& tuple) {
  const auto& [rows, qkv, q_weight, k_weight, cos, sin] = tuple;
  if (rows < 0) throw std::invalid_argument("sizes must not be negative");
  if (rows == 0) return {};
  return {rows,
          to_rows("qkv", qkv),
          to_vector("q_weight", q_weight),
          to_vector("k_weight", k_weight),
          static_cast<const float*>(to_output("cos", std::get<0>(cos))),
          static_cast<const float*>(to_output("sin", std::get<0>(sin))),
          std::get<1>(cos),
          std::get<1>(sin)};
}

void qk_norm_rope_cpu(HeadSizes sizes, int dtype, const StreamTuple& text, const StreamTuple& image,
                      Address out, float eps, int isa, int threads) {
  const auto [B, G, d] = sizes;
  if (B < 0 || G < 0 || d < 0 || d % 2 != 0)
    throw std::invalid_argument("sizes must not be negative, and d must be even");
  if (B == 0 || G == 0 || d == 0) return;
  const QkNormRopeArgs args{
      B, G, d, to_dtype(dtype), to_stream(text), to_stream(image), to_output("out", out), eps};
  const cpu::Isa chosen = to_isa(isa);
  py::gil_scoped_release unlocked;
  cpu::qk_norm_rope(args, chosen, threads);
}

}  // namespace

void bind_qk_norm_rope(py::module_& m) { m.def("qk_norm_rope_cpu", &qk_norm_rope_cpu); }

}  // namespace pixeldiff
