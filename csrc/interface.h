#pragma once

namespace pixeldiff {

// What pixeldiff/native.py must expect of this module: it compares the number with its own and
// refuses another. Raise both with every change of a function's name or arguments.
constexpr int kInterface = 2;

}  // namespace pixeldiff
