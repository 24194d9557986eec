// Where in a launch a thread stands. Blocks are one-dimensional, but for the elementwise kernels, which use position().
#pragma once

#include "device.cuh"

namespace shrank::arch {

inline constexpr int kWarpSize = 32;

struct Position {
  int64_t column, row;  // of this thread in the whole grid
  int64_t columns, rows;  // threads of the whole grid
};

#if defined(__CUDACC__) || defined(SHRANK_EMULATED)
#ifdef __CUDACC__
#define SHRANK_INDEX(name) name
#else
#define SHRANK_INDEX(name) emulator::name()
#endif

SHRANK_DEVICE Position position() {
  const auto &thread = SHRANK_INDEX(threadIdx), &block = SHRANK_INDEX(blockIdx);
  const auto &threads = SHRANK_INDEX(blockDim), &blocks = SHRANK_INDEX(gridDim);
  return {static_cast<int64_t>(block.x) * threads.x + thread.x, static_cast<int64_t>(block.y) * threads.y + thread.y,
          static_cast<int64_t>(blocks.x) * threads.x, static_cast<int64_t>(blocks.y) * threads.y};
}

SHRANK_DEVICE int thread_index() { return static_cast<int>(SHRANK_INDEX(threadIdx).x); }
SHRANK_DEVICE int lane_index() { return thread_index() % kWarpSize; }
SHRANK_DEVICE int warp_index() { return thread_index() / kWarpSize; }
SHRANK_DEVICE int block_x() { return static_cast<int>(SHRANK_INDEX(blockIdx).x); }
SHRANK_DEVICE int block_y() { return static_cast<int>(SHRANK_INDEX(blockIdx).y); }
SHRANK_DEVICE int blocks_y() { return static_cast<int>(SHRANK_INDEX(gridDim).y); }
#undef SHRANK_INDEX
#endif

// The same number, unknown to the compiler: what was computed from it before is not kept in registers until it is needed
// again.
SHRANK_DEVICE int anew(int number) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(number));
#endif
  return number;
}

}  // namespace shrank::arch
