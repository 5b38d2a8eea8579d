#include "parallel.h"

#include <algorithm>
#ifndef _OPENMP
#include <thread>
#include <vector>
#endif

namespace pixeldiff::cpu {

int worker_count(int64_t count, int64_t grain, int threads) {
  const int64_t ranges = (count + grain - 1) / grain;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(ranges, threads)));
}

void parallel_for(int64_t count, int workers, RangeBody body, const void* context) {
  const int64_t share = count / workers;
  const int64_t extra = count % workers;  // the first `extra` ranges are one item longer
  const auto run = [=](int worker) {
    const int64_t begin = worker * share + std::min<int64_t>(worker, extra);
    const int64_t end = begin + share + (worker < extra ? 1 : 0);
    if (begin < end) body(context, begin, end, worker);
  };
  if (workers == 1) {
    run(0);
    return;
  }
#ifdef _OPENMP
  // A loop over ranges, not one range per thread: the runtime may grant fewer threads than asked.
#pragma omp parallel for num_threads(workers) schedule(static, 1)
  for (int worker = 0; worker < workers; ++worker) run(worker);
#else
  std::vector<std::thread> team;
  team.reserve(workers - 1);
  for (int worker = 1; worker < workers; ++worker) team.emplace_back(run, worker);
  run(0);
  for (std::thread& member : team) member.join();
#endif
}

}  // namespace pixeldiff::cpu
