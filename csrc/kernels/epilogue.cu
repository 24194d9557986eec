#include "epilogue.cuh"
#include "launch.cuh"

namespace shrank {
namespace {

template <typename Kernel, typename Params>
__global__ void __launch_bounds__(256) epilogue_kernel(const __grid_constant__ Params params) {
  Kernel::run(params, arch::position());
}

template <template <typename, int, Activation> class Kernel, typename Params>
void launch_any(const char* name, const Params& params, const EpilogueTile& tile, void* stream) {
  if (params.M == 0 || params.N == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(tile.blocks_n, tile.blocks_m);
  config.blockDim = dim3(tile.threads_n, tile.threads_m);
  config.stream = static_cast<cudaStream_t>(stream);
  with_epilogue<Kernel>(params, tile, [&](auto kernel) {
    check_launch(cudaLaunchKernelEx(&config, epilogue_kernel<decltype(kernel), Params>, params), name);
  });
}

}  // namespace

void launch_epilogue(const EpilogueParams& params, const EpilogueTile& tile, void* stream) {
  launch_any<Epilogue>("epilogue", params, tile, stream);
}

void launch_epilogue_backward(const EpilogueBackwardParams& params, const EpilogueTile& tile, void* stream) {
  launch_any<EpilogueBackward>("epilogue_backward", params, tile, stream);
}

}  // namespace shrank
