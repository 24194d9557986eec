#include <stdexcept>
#include <string>

#include "epilogue.cuh"

namespace shrank {

template <typename Kernel> __global__ void __launch_bounds__(256) epilogue_kernel(const EpilogueParams params) {
  Kernel::run(params, arch::position());
}

void launch_epilogue(const EpilogueParams& params, const EpilogueTile& tile, void* stream) {
  if (params.M == 0 || params.N == 0) return;
  const dim3 grid(tile.blocks_n, tile.blocks_m), block(tile.threads_n, tile.threads_m);
  with_epilogue(params, tile, [&](auto kernel) {
    epilogue_kernel<decltype(kernel)><<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(params);
  });
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    throw std::runtime_error(std::string("shrank: the epilogue kernel was not launched: ") + cudaGetErrorString(error));
  }
}

}  // namespace shrank
