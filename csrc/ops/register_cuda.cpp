// The ops on CUDA, and what this build is.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <mutex>
#include <string>

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

std::string version(int number) {  // 13000 -> 13.0
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// As JSON: the CUDA runtime inside, the architectures, the torch it was compiled against, the driver's CUDA or null.
std::string build_info() {
  int driver = 0;
  const bool has_driver = cudaDriverGetVersion(&driver) == cudaSuccess && driver > 0;
  const uint64_t torch = TORCH_ABI_VERSION;
  return R"({"cuda": ")" + version(CUDART_VERSION) + R"(", "archs": ")" SHRANK_CUDA_ARCHS R"(", "torch": ")" +
         std::to_string(torch >> 56) + "." + std::to_string(torch >> 48 & 255) + R"(", "driver": )" +
         (has_driver ? '"' + version(driver) + '"' : "null") + "}";
}

}  // namespace
}  // namespace shrank

STABLE_TORCH_LIBRARY_FRAGMENT(shrank, library) { library.def("build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(shrank, CompositeExplicitAutograd, library) {
  library.impl("build_info", TORCH_BOX(&shrank::build_info));
}

STABLE_TORCH_LIBRARY_IMPL(shrank, CUDA, library) { SHRANK_IMPL_LOW_RANK_LINEAR(library, shrank::cuda); }
