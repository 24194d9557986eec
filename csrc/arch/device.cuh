// How a function of the device is spelled, for the three compilers of kernel source:
//   nvcc                        the GPU
//   g++ -DSHRANK_EMULATED       the emulator, which checks every access and every instruction
//   g++                         a plain loop over threads, for kernels without barriers (kernels/epilogue_host.cpp)
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SHRANK_DEVICE __device__ __forceinline__
#define SHRANK_BOTH __host__ SHRANK_DEVICE
#else
// Inlined at -O0 too: the emulator names the source line that an instruction's return address stands for.
#define SHRANK_DEVICE inline __attribute__((always_inline))
#define SHRANK_BOTH SHRANK_DEVICE
#endif
#ifdef SHRANK_EMULATED
#include "../emulator/instructions.h"
#endif
