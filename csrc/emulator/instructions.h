// What arch/ calls on a CPU: one function for each machine instruction. The calling fiber is the CUDA thread.
// Every access is checked (shadow memory, vector clocks); every warp instruction is a rendezvous of its lanes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace shrank::emulator {

struct Index3 { unsigned x = 1, y = 1, z = 1; };

// CUDA's names: arch/position.cuh uses them on both machines.
const Index3& threadIdx();
const Index3& blockIdx();
const Index3& blockDim();
const Index3& gridDim();

// The 32-bit address of the block's dynamic shared memory; kernels have no other.
uint32_t dynamic_shared();
void load_shared(void* to, uint32_t address, int bytes);
void store_shared(uint32_t address, const void* from, int bytes);
void load_global(void* to, const void* address, int bytes);
void store_global(void* address, const void* from, int bytes);

void copy_async(uint32_t to, const void* from, int valid);
void copy_async_commit();
void copy_async_wait(int pending);

void sync_threads();
void sync_warp(uint32_t lanes);
float exchange(float number, int lanes);
void grid_dependency_wait();
void grid_dependency_launch();

void load_matrices(uint32_t (&fragment)[4], uint32_t row, bool transposed);
enum class Half { bfloat16, float16 };
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half half);

}  // namespace shrank::emulator
