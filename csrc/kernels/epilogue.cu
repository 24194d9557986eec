#include "epilogue.cuh"
#include "launch.cuh"

namespace shrank {

template <typename Kernel> __global__ void __launch_bounds__(256) epilogue_kernel(const EpilogueParams params) {
  Kernel::run(params, arch::position());
}

void launch_epilogue(const EpilogueParams& params, const EpilogueTile& tile, void* stream) {
  if (params.M == 0 || params.N == 0) return;
  const dim3 grid(tile.blocks_n, tile.blocks_m), block(tile.threads_n, tile.threads_m);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = static_cast<cudaStream_t>(stream);
  with_epilogue(params, tile, [&](auto kernel) {
    check_launch(cudaLaunchKernelEx(&config, epilogue_kernel<decltype(kernel)>, params), "epilogue");
  });
}

}  // namespace shrank
