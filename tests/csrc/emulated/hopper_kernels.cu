// Compiled, and looked at, by test_hopper_emulator.py.
#include "hopper_kernels.cuh"

#include "../../../csrc/kernels/launch.cuh"

namespace shrank {

template __global__ void entry<tests::TiledProduct<arch::bfloat16>>(const __grid_constant__ tests::ProductParams);
template __global__ void entry<tests::TiledProduct<arch::float16>>(const __grid_constant__ tests::ProductParams);

}  // namespace shrank
