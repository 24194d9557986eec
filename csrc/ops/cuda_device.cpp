#include "cuda_device.h"

#include <cuda_runtime_api.h>

#include <array>
#include <mutex>
#include <stdexcept>
#include <string>

namespace shrank {
namespace {

struct Known {
  std::once_flag asked;
  cudaDeviceProp properties;  // holds the name that `device` points to
  Device device;
};

void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("shrank: ") + call + ": " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
  return value;
}

void ask(Known& known, int index) {
  cudaDeviceProp& found = known.properties;
  check(cudaGetDeviceProperties(&found, index), "cudaGetDeviceProperties");
  known.device = from_attributes(found.name, found.major, found.minor, found.multiProcessorCount,
                                 attribute(cudaDevAttrClockRate, index), attribute(cudaDevAttrMemoryClockRate, index),
                                 found.memoryBusWidth, found.l2CacheSize,
                                 static_cast<int>(found.sharedMemPerBlockOptin));
}

}  // namespace

const Device& cuda_device(int index) {
  constexpr int most = 64;
  static std::array<Known, most> known;
  if (index < 0 || index >= most) {
    throw std::invalid_argument("shrank: CUDA device " + std::to_string(index) + ", wanted 0 to " +
                                std::to_string(most - 1));
  }
  std::call_once(known[index].asked, [index] { ask(known[index], index); });
  return known[index].device;
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing");
  return status == cudaStreamCaptureStatusActive;
}

}  // namespace shrank
