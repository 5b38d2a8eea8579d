// Which instruction sets this binary was compiled for, and which of them this processor runs.
#pragma once

namespace pixeldiff::cpu {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };
constexpr Isa kIsas[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16};

const char* isa_name(Isa isa);
bool isa_compiled(Isa isa);
bool isa_usable(Isa isa);  // compiled, and supported by this processor and its operating system
Isa best_isa();

}  // namespace pixeldiff::cpu
