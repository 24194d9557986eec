// The way back through the end of a low-rank layer, from h: what the backward pass does instead of keeping z. Of a gated
// layer as well.
#pragma once

#include "../select/linear_problem.h"
#include "../select/linear_tile.h"
#include "pair.h"

namespace shrank {

// All row-major, contiguous and aligned to 16 bytes; N is a multiple of 8.
struct ExpandBackwardParams {
  Pair pair[2];  // the layer's, or gate and value; down is null, h is read
  const void* grad;  // (M, N), of y
  void* dz[2];  // (M, N), of each pair: of h up^T + bias
  float* sums[2];  // (backward_sum_rows, N), of each pair, or null: sums of dz over the rows of a warp
  int64_t M;
  int N;
  Dtype dtype;  // float16 or bfloat16
  Activation activation;
};

// `dependent`: as of launch_low_rank_linear.
void launch_expand_backward(const ExpandBackwardParams& params, const LinearGrid& grid, bool dependent, void* stream);

}  // namespace shrank
