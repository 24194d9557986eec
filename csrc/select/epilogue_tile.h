// How the epilogue kernel covers its tensors.
#pragma once

#include <cstdint>

#include "device.h"
#include "linear_problem.h"

namespace shrank {

// A thread owns one vector of columns and strides over the rows.
//   column = (blockIdx.x * threads_n + threadIdx.x) * vector
//   row    = blockIdx.y * threads_m + threadIdx.y, then += blocks_m * threads_m
struct EpilogueTile {
  int vector;         // numbers per access: 16 bytes, or 1 number where rows are not aligned
  int threads_n;      // power of two, 8 to 256
  int threads_m;      // threads_n * threads_m = 256
  int64_t blocks_n;   // gridDim.x; 0 if y is empty
  int64_t blocks_m;   // gridDim.y, at most 65535; 0 if y is empty
};

EpilogueTile epilogue_tile(const LinearProblem& p, const Device& d);

}  // namespace shrank
