// Instructions of sm_90a: barriers in shared memory, copies of whole tiles, products by four warps (a warpgroup).
// Tiles are rows of 128 bytes with the 128-byte swizzle: what belongs at address a lies at a ^ (a / 128 % 8 * 16).
#pragma once

#include "shared.cuh"
#ifdef __CUDACC__
#include <cuda.h>
#else
#include "../emulator/hopper.h"
#endif

// Where the functions of this file can be called: a kernel for several architectures leaves its body empty elsewhere.
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SHRANK_HOPPER 1
#endif

namespace shrank::arch {

// A matrix in global memory and the tile that one copy brings. A kernel's parameter, __grid_constant__.
#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = emulator::TensorMap;
#endif

// ---- A barrier is 8 bytes of shared memory. A phase ends when all threads have arrived and all expected bytes have
// landed; the next begins at once. PTX ISA, "mbarrier".

SHRANK_DEVICE void init_barrier(SharedAddress barrier, int arrivals) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#else
  emulator::init_barrier(barrier, arrivals);
#endif
}

// Copies may signal the barriers that this thread has made.
SHRANK_DEVICE void fence_barrier_init() {
#ifdef __CUDACC__
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  emulator::fence_barrier_init();
#endif
}

// What this thread has stored to shared memory can be read by warpgroup_multiply_add, after a barrier of the threads.
SHRANK_DEVICE void fence_async_proxy() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  emulator::fence_async_proxy();
#endif
}

SHRANK_DEVICE void arrive(SharedAddress barrier) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#else
  emulator::arrive(barrier);
#endif
}

// Arrives, and the phase does not end before `bytes` more have landed.
SHRANK_DEVICE void arrive_expecting(SharedAddress barrier, int bytes) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#else
  emulator::arrive_expecting(barrier, bytes);
#endif
}

// Until the phase of this parity has ended; the first has parity 0. On a fresh barrier, parity 1 does not wait.
SHRANK_DEVICE void await_barrier(SharedAddress barrier, uint32_t parity) {
#ifdef __CUDACC__
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity) : "memory");
#else
  emulator::await_barrier(barrier, parity);
#endif
}

// The tile whose first number is (row, column) is on its way to shared memory, aligned to 1024 bytes; what lies outside
// of the matrix is zero. All its bytes count for the barrier. PTX ISA, "cp.async.bulk.tensor".
SHRANK_DEVICE void copy_tile_async(SharedAddress to, const TensorMap& map, int column, int row, SharedAddress barrier) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier) : "memory");
#else
  emulator::copy_tile_async(to, map, column, row, barrier);
#endif
}

}  // namespace shrank::arch
