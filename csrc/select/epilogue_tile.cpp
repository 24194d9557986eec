#include "epilogue_tile.h"

#include <algorithm>

#include "integers.h"

namespace shrank {

EpilogueTile epilogue_tile(const LinearProblem& p, const Device& d) {
  constexpr int kThreads = 256, kWidest = 256, kNarrowest = 8;  // aligned: at least 128 contiguous bytes per row
  constexpr int64_t kBlocksPerSm = 8;  // 2048 threads fill an SM; gridDim.y stays far below its limit of 65535
  const int widest_access = 16 / bytes(p.dtype);
  const int vector = p.aligned && p.N % widest_access == 0 ? widest_access : 1;
  const int64_t vectors = p.N / vector;

  // The widest that leaves at most 1/8 of its lanes without a column, else the one that leaves the fewest.
  const auto lanes = [vectors](int width) { return ceil_div(vectors, width) * width; };
  int threads_n = kWidest;
  for (int width = kWidest; width >= kNarrowest; width /= 2) {
    if (lanes(width) < lanes(threads_n)) threads_n = width;
    if (8 * (lanes(threads_n) - vectors) <= lanes(threads_n)) break;
  }

  const int threads_m = kThreads / threads_n;
  const int64_t blocks_n = p.M == 0 ? 0 : ceil_div(vectors, threads_n);
  if (blocks_n == 0) return {vector, threads_n, threads_m, 0, 0};
  const int64_t enough = ceil_div(d.sms * kBlocksPerSm, blocks_n);
  return {vector, threads_n, threads_m, blocks_n, std::min(ceil_div(p.M, threads_m), enough)};
}

}  // namespace shrank
