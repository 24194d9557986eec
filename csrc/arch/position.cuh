// Where in a launch a thread stands.
#pragma once

#include <cstdint>

#include "scalar.cuh"

namespace shrank::arch {

struct Position {
  int64_t column, row;          // of this thread in the whole grid
  int64_t columns, rows;        // threads of the whole grid
};

#ifdef __CUDACC__
SHRANK_DEVICE Position position() {
  return {static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x,
          static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y,
          static_cast<int64_t>(gridDim.x) * blockDim.x, static_cast<int64_t>(gridDim.y) * blockDim.y};
}
#endif

}  // namespace shrank::arch
