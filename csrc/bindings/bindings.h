// One function for each op, which adds its entry points to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace pixeldiff {

void bind_sigma_gate(pybind11::module_& m);
void bind_swiglu(pybind11::module_& m);

}  // namespace pixeldiff
