#pragma once

#include <cstdint>

namespace pixeldiff::cpu {

// Splits [0, count) into at most `threads` contiguous ranges of at least `grain` items and runs
// body(context, begin, end, worker) once for each, `worker` counting from 0. `body` must not throw.
// OpenMP is used where the compiler has it: importing torch first loads the same runtime library,
// so both draw on one pool of threads instead of competing for the cores.
using RangeBody = void (*)(const void* context, int64_t begin, int64_t end, int worker);

// The number of ranges `parallel_for` will use; callers size their per-worker scratch with it.
int worker_count(int64_t count, int64_t grain, int threads);
void parallel_for(int64_t count, int workers, RangeBody body, const void* context);

}  // namespace pixeldiff::cpu
