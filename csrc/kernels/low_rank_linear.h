// The whole low-rank layer in one kernel, or all of it that comes after h.
#pragma once

#include "../select/linear_tile.h"
#include "../select/linear_problem.h"

namespace shrank {

// All row-major, contiguous and aligned to 16 bytes; K, N and R are multiples of 8.
struct LowRankLinearParams {
  const void* x;         // (M, K) or null: from h
  const void* down;      // (R, K) or null, as x
  const void* up;        // (N, R)
  const void* bias;      // (N) or null
  const void* residual;  // (M, N) or null
  void* h;               // (M, R)  from x: written unless null; from h: read
  void* y;               // (M, N)
  int64_t M;
  int K, N, R;
  Dtype dtype;           // float16 or bfloat16
  Activation activation;
};

// h is rounded once, as two PyTorch calls round it; sums, bias, activation and residual are fp32, rounded once.
// `dependent`: the grid may start before the one before it has ended (programmatic dependent launch, sm_90 and later).
void launch_low_rank_linear(const LowRankLinearParams& params, const LinearGrid& grid, bool dependent, void* stream);

}  // namespace shrank
