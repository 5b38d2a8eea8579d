// From the tuples of pixeldiff/native.py to the structs of the kernels. What is checked here is
// what guards memory.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "../cpu/isa.h"
#include "../dtype.h"

namespace pixeldiff::bindings {

using Address = uintptr_t;
using VectorTuple = std::tuple<Address, int, int64_t>;    // data or 0, dtype code, stride over B
using RowsTuple = std::tuple<Address, int64_t, int64_t>;  // data, stride over B, stride over N
using Sizes = std::tuple<int64_t, int64_t, int64_t>;      // B, N, D

inline DType to_dtype(int code) {
  if (code < 0 || code > 2)
    throw std::invalid_argument("dtype code must be 0 (fp32), 1 (bf16) or 2 (fp16), got " +
                                std::to_string(code));
  return static_cast<DType>(code);
}

inline bool is_empty(Sizes sizes) {
  const auto [B, N, D] = sizes;
  if (B < 0 || N < 0 || D < 0) throw std::invalid_argument("sizes must not be negative");
  return B == 0 || N == 0 || D == 0;
}

inline Vector to_vector(const char* name, VectorTuple tuple) {
  const auto [address, dtype, stride_b] = tuple;
  if (address == 0) throw std::invalid_argument(std::string(name) + " has no data");
  return {reinterpret_cast<const void*>(address), to_dtype(dtype), stride_b};
}

inline Rows to_rows(const char* name, RowsTuple tuple) {
  const auto [address, stride_b, stride_n] = tuple;
  if (address == 0) throw std::invalid_argument(std::string(name) + " has no data");
  return {reinterpret_cast<const void*>(address), stride_b, stride_n};
}

inline void* to_output(const char* name, Address address) {
  if (address == 0) throw std::invalid_argument(std::string(name) + " has no data");
  return reinterpret_cast<void*>(address);
}

inline cpu::Isa to_isa(int code) {
  if (code < 0 || code > 2 || !cpu::isa_usable(static_cast<cpu::Isa>(code)))
    throw std::invalid_argument("instruction set " + std::to_string(code) +
                                " was not compiled in or this processor lacks it");
  return static_cast<cpu::Isa>(code);
}

}  // namespace pixeldiff::bindings
