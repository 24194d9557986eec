// The way back through the end of a low-rank layer, from h: what the backward pass does instead of keeping z.
#pragma once

#include "../select/linear_problem.h"
#include "../select/linear_tile.h"

namespace shrank {

// All row-major, contiguous and aligned to 16 bytes; N and R are multiples of 8.
struct ExpandBackwardParams {
  const void* h;     // (M, R)
  const void* up;    // (N, R)
  const void* bias;  // (N) or null
  const void* grad;  // (M, N), of y
  void* dz;          // (M, N): grad times the derivative of the activation at h up^T + bias
  float* sums;       // (backward_sum_rows, N) or null: sums of dz over the rows of a warp
  int64_t M;
  int N, R;
  Dtype dtype;  // float16 or bfloat16
  Activation activation;
};

// `dependent`: as of launch_low_rank_linear.
void launch_expand_backward(const ExpandBackwardParams& params, const LinearGrid& grid, bool dependent, void* stream);

}  // namespace shrank
