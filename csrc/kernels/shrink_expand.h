// A low-rank layer on a few rows, such as the tokens of a decoding step: two launches, both of which stream weights.
#pragma once

#include "../select/linear_problem.h"
#include "../select/shrink_expand_tile.h"

namespace shrank {

// All row-major, contiguous and aligned to 16 bytes; K, N and R are multiples of 8.
struct ShrinkExpandParams {
  const void* x;         // (M, K)
  const void* down;      // (R, K)
  const void* up;        // (N, R)
  const void* bias;      // (N) or null
  const void* residual;  // (M, N) or null
  float* sums;           // (splits, M, R): of each split of K, its part of h; null where there is one split
  void* h;               // (M, R): between the launches where there is one split; else null, or written for training
  void* y;               // (M, N)
  int M, K, N, R, splits;
  Dtype dtype;           // float16 or bfloat16
  Activation activation;
};

// Rounds as low_rank_linear does, always in the same order. `dependent`: as there; the second launch may also start
// before the first one ends.
void launch_shrink_expand(const ShrinkExpandParams& params, const ShrinkExpandTile& tile, bool dependent, void* stream);

}  // namespace shrank
