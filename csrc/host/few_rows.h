// A low-rank layer of a few rows of x on a CPU: its weights are read once, as fast as memory gives them.
//
// BLAS and oneDNN make such products with the code of large ones, at a third to two thirds of that rate
// (benchmarks/speed/bench_cpu_layers.py).
#pragma once

#include <cstdint>

#include "../select/vocabulary.h"

namespace shrank::host {

// y = h up^T + bias + residual with h = x down^T, which is rounded to dtype as two layers round it. With an order,
// outputs that are pivots are h itself: order[n] is the place of output n among the R pivots and then the N - R rows of
// up. All is row-major without gaps.
struct FewRows {
  const float* x;          // (M, K)
  const void* down;        // (R, K)
  const void* up;          // (N, R), with an order (N - R, R)
  const void* bias;        // of the rows of up, or null
  const void* pivot_bias;  // (R), or null
  const int32_t* order;    // (N), or null
  const void* residual;    // (M, N), or null
  float* h;                // (M, R)
  void* y;                 // (M, N)
  int64_t M, K, N, R;
  Dtype dtype;  // of all but x and h: float32 or bfloat16
};

// The columns [first, last) of h, and then, of all of h, those of y: threads share them out.
void shrink(const FewRows& layer, int64_t first, int64_t last);
void expand(const FewRows& layer, int64_t first, int64_t last);

// The numbers of 16 bits of x, as `shrink` wants them.
void widen_bfloat16(const void* from, float* to, int64_t count);

}  // namespace shrank::host
