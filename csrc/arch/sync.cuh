// Barriers, and the order between one grid and the next.
#pragma once

#include "device.cuh"

namespace shrank::arch {

SHRANK_DEVICE void sync_threads() {
#ifdef __CUDACC__
  __syncthreads();
#else
  emulator::sync_threads();
#endif
}

SHRANK_DEVICE void sync_warp() {
#ifdef __CUDACC__
  __syncwarp();
#else
  emulator::sync_warp(0xffffffffu);
#endif
}

// Until the grids that this one was launched behind are complete and their writes visible (programmatic dependent
// launch). Before it, nothing that they may write can be read. Nothing to wait for below sm_90.
SHRANK_DEVICE void grid_dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#elif defined(SHRANK_EMULATED)
  emulator::grid_dependency_wait();
#endif
}

// The next grid may start its blocks; it still waits for this one's end before it reads.
SHRANK_DEVICE void grid_dependency_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#elif defined(SHRANK_EMULATED)
  emulator::grid_dependency_launch();
#endif
}

}  // namespace shrank::arch
