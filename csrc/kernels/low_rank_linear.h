// The whole low-rank layer in one kernel, or all of it that comes after h. A gated layer as well.
#pragma once

#include "../select/linear_problem.h"
#include "../select/linear_tile.h"
#include "pair.h"

namespace shrank {

// All row-major, contiguous and aligned to 16 bytes; K and N are multiples of 8.
struct LowRankLinearParams {
  const void* x;         // (M, K) or null: from h
  Pair pair[2];          // the layer's, or gate and value; h: from x written unless null, from h read
  const void* residual;  // (M, N) or null, as of a gated layer
  void* y;               // (M, N)
  int64_t M;
  int K, N;
  Dtype dtype;            // float16 or bfloat16
  Activation activation;  // of a gated layer of the gate
};

// h is rounded once, as two PyTorch calls round it; sums, bias, activation, residual and product are fp32, rounded once.
// The tile says how many pairs there are.
// `dependent`: the grid may start before the one before it has ended (programmatic dependent launch, sm_90 and later).
void launch_low_rank_linear(const LowRankLinearParams& params, const LinearGrid& grid, bool dependent, void* stream);

}  // namespace shrank
