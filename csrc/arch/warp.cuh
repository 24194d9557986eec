// Numbers that change hands within a warp.
#pragma once

#include "device.cuh"

namespace shrank::arch {

// What the lane passes whose number differs in the bits of LANES. All lanes take part.
template <int LANES> SHRANK_DEVICE float exchange(float number) {
#ifdef __CUDACC__
  return __shfl_xor_sync(0xffffffffu, number, LANES);
#else
  return emulator::exchange(number, LANES);
#endif
}

}  // namespace shrank::arch
