// The instructions of sm_90 on a CPU: barriers in shared memory, copies of tiles, products of four warps.
// Tiles and operands have rows of 128 bytes and the 128-byte swizzle; no clusters.
#pragma once

#include <cstdint>

#include "instructions.h"

namespace shrank::emulator {

// What CUtensorMap is to the device: a row-major matrix of 16-bit numbers, and the tile that one copy brings.
struct alignas(64) TensorMap {
  const void* base;
  int64_t columns, rows;
  int64_t row_bytes;             // from one row to the next
  int tile_columns, tile_rows;
};

void init_barrier(uint32_t barrier, int arrivals);
void fence_barrier_init();
void fence_async_proxy();
void arrive(uint32_t barrier);
void arrive_expecting(uint32_t barrier, int bytes);
void await_barrier(uint32_t barrier, uint32_t parity);
void copy_tile_async(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier);

void warpgroup_fence();
void warpgroup_commit();
void warpgroup_wait(int pending);
void warpgroup_multiply_add(float* sum, int columns, uint64_t a, uint64_t b, Half half);

}  // namespace shrank::emulator
