// The ops on CUDA.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <mutex>

#include "low_rank_linear.h"

// Weak: a torch built for CPUs lacks it, and the extension must load there too.
extern "C" AOTITorchError __attribute__((weak)) aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                    void** ret_stream);

namespace shrank {
namespace {

void check(cudaError_t error, const char* call) {
  STD_TORCH_CHECK(error == cudaSuccess, "shrank: ", call, ": ", cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
  return value;
}

struct Known {
  std::once_flag asked;
  cudaDeviceProp properties;  // holds the name that `device` points to
  Device device;
};

void ask(Known& known, int index) {
  cudaDeviceProp& found = known.properties;
  check(cudaGetDeviceProperties(&found, index), "cudaGetDeviceProperties");
  known.device = from_attributes(found.name, found.major, found.minor, found.multiProcessorCount,
                                 attribute(cudaDevAttrClockRate, index), attribute(cudaDevAttrMemoryClockRate, index),
                                 found.memoryBusWidth, found.l2CacheSize,
                                 static_cast<int>(found.sharedMemPerBlockOptin));
}

// Asked once per device: cudaGetDeviceProperties is slow.
const Device& device(int index) {
  constexpr int most = 64;
  static std::array<Known, most> known;
  STD_TORCH_CHECK(index >= 0 && index < most, "shrank: CUDA device ", index, ", wanted 0 to ", most - 1);
  std::call_once(known[index].asked, [index] { ask(known[index], index); });
  return known[index].device;
}

void epilogue(const EpilogueParams& params, const EpilogueTile& tile, int index) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  if (torch::stable::accelerator::getCurrentDeviceIndex() == index) return launch_epilogue(params, tile, stream);
  const torch::stable::accelerator::DeviceGuard guard(index);
  launch_epilogue(params, tile, stream);
}

constexpr Backend cuda{device, epilogue};

}  // namespace
}  // namespace shrank

STABLE_TORCH_LIBRARY_IMPL(shrank, CUDA, library) { SHRANK_IMPL_LOW_RANK_LINEAR(library, shrank::cuda); }
