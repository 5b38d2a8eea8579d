// From what Python passes to what kernels take, with the checks that guard memory.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../cpu/isa.h"
#include "../dtype.h"

namespace pixeldiff::bindings {

using Address = uintptr_t;

inline DType to_dtype(int code) {
  if (code < 0 || code > 2)
    throw std::invalid_argument("dtype code must be 0 (fp32), 1 (bf16) or 2 (fp16), got " +
                                std::to_string(code));
  return static_cast<DType>(code);
}

inline cpu::Isa to_isa(int code) {
  if (code < 0 || code > 2 || !cpu::isa_usable(static_cast<cpu::Isa>(code)))
    throw std::invalid_argument("instruction set " + std::to_string(code) +
                                " was not compiled in or this processor lacks it");
  return static_cast<cpu::Isa>(code);
}

template <class T>
T* to_pointer(const char* name, Address address) {
  if (address == 0) throw std::invalid_argument(std::string(name) + " has no data");
  return reinterpret_cast<T*>(address);
}

}  // namespace pixeldiff::bindings
