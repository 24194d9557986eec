// How a kernel is launched: a struct with Params, kThreads, kSharedBytes and run(const Params&). nvcc only.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace shrank {

// One block an SM is enough to promise: then ptxas uses the registers there are, and two blocks of 128 threads fit
// anyway. Left to itself it aims at more blocks, and spills (nvcc 13.0, sm_90a). A kernel that gains by more says so.
template <typename Kernel> constexpr auto blocks_of_sm(int) -> decltype(Kernel::kBlocksOfSm) {
  return Kernel::kBlocksOfSm;
}
template <typename Kernel> constexpr int blocks_of_sm(long) { return 1; }

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, blocks_of_sm<Kernel>(0))
    entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

inline void check_launch(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reported here: else the next one who asks the runtime would take it for his own
  throw std::runtime_error(std::string("shrank: the ") + kernel +
                           " kernel was not launched: " + cudaGetErrorString(error));
}

// More than 48 KiB of shared memory must be asked for, once for each device: as much as the kernel may ever want, if a
// block can have that there.
template <typename Kernel> void allow_shared(const char* name) {
  static std::atomic<uint64_t> allowed{0};
  int device = 0;
  check_launch(cudaGetDevice(&device), name);
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (allowed.load(std::memory_order_relaxed) & bit) return;
  int most = 0;
  check_launch(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
  check_launch(cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    std::min(most, Kernel::kSharedBytes)),
               name);
  allowed.fetch_or(bit, std::memory_order_relaxed);
}

// `dependent`: the kernel waits by itself for the grids before it, and may be launched before they end. shared_bytes:
// what these parameters want of kSharedBytes.
template <typename Kernel>
void launch(const char* name, dim3 grid, const typename Kernel::Params& params, bool dependent, void* stream,
            int shared_bytes = Kernel::kSharedBytes) {
  allow_shared<Kernel>(name);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(Kernel::kThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  check_launch(cudaLaunchKernelEx(&config, entry<Kernel>, params), name);
}

}  // namespace shrank
