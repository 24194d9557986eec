// The elementwise end of a low-rank layer, y = activation(z) + residual, in one pass over memory.
#pragma once

#include <cstdint>

#include "../select/epilogue_tile.h"

namespace shrank {

struct EpilogueParams {
  const void* z;         // (M, N) row-major: h @ up.T + bias, as the GEMM rounded it; may be y
  const void* residual;  // (M, N) or null
  void* y;               // (M, N)
  int64_t M, N;
  Dtype dtype;
  Activation activation;
};

// The way back: dz = grad activation'(z), and its sums over the rows of a thread, in one pass.
struct EpilogueBackwardParams {
  const void* z;     // (M, N) row-major; may be dz
  const void* grad;  // (M, N), of y
  void* dz;          // (M, N)
  void* sums;        // (rows of threads, N) or null, in float, of float64 in double
  int64_t M, N;
  Dtype dtype;
  Activation activation;
};

// Arithmetic in fp32, fp64 for fp64, rounded once.
void launch_epilogue(const EpilogueParams& params, const EpilogueTile& tile, void* stream);  // epilogue.cu
void run_epilogue_on_host(const EpilogueParams& params, const EpilogueTile& tile);           // epilogue_host.cpp
void launch_epilogue_backward(const EpilogueBackwardParams& params, const EpilogueTile& tile, void* stream);
void run_epilogue_backward_on_host(const EpilogueBackwardParams& params, const EpilogueTile& tile);

}  // namespace shrank
