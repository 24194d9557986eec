// A stand-in for the CUDA runtime: the functions that the extension calls, with the checks that the real one makes. A
// launch that passes them runs in the emulator. The numbers are those of the CUDA C++ Programming Guide, technical
// specifications per compute capability; the order of errors is the CUDA Runtime API's.
#include <cuda_runtime_api.h>
#include <cxxabi.h>

#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <string>

#include "machine.h"

using shrank::Device;
using shrank::rehearsal::Gpu;
using shrank::rehearsal::machine;

namespace {

constexpr int kWithoutOptIn = 48 * 1024;

std::string demangled(const char* name) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(name, nullptr, nullptr, &status), std::free);
  return status == 0 ? text.get() : name;
}

// Every failure is also the last error, until somebody asks for it.
cudaError_t answer(const char* function, cudaError_t error, const std::string& why = "") {
  if (error != cudaSuccess) {
    machine().last_error = error;
    machine().log.push_back(std::string(function) + " failed: " + cudaGetErrorName(error) + (why.empty() ? "" : ": ") +
                            why);
  }
  return error;
}

// The fault that a test has armed for this function.
cudaError_t armed(const char* function) {
  const auto found = machine().faults.find(function);
  if (found == machine().faults.end()) return cudaSuccess;
  if (found->second.before > 0) return found->second.before--, cudaSuccess;
  if (found->second.calls <= 0) return cudaSuccess;
  found->second.calls--;
  return static_cast<cudaError_t>(found->second.error);
}

const Gpu* gpu(int index) {
  const auto& gpus = machine().gpus;
  return index >= 0 && static_cast<std::size_t>(index) < gpus.size() ? &gpus[static_cast<std::size_t>(index)] : nullptr;
}

struct Refusal {
  cudaError_t error;
  std::string why;
};

// What the runtime would refuse of a launch; cudaSuccess: nothing.
Refusal refusal(const cudaLaunchConfig_t& config, const void* kernel, const Gpu& here) {
  const Device& device = *here.device;
  const dim3 &g = config.gridDim, &b = config.blockDim;
  if (machine().kernels.count(kernel) == 0) return {cudaErrorInvalidDeviceFunction, "no such kernel"};
  if (g.x == 0 || g.y == 0 || g.z == 0 || b.x == 0 || b.y == 0 || b.z == 0)
    return {cudaErrorInvalidConfiguration, "an empty grid or block"};
  if (g.x > 2147483647u || g.y > 65535 || g.z > 65535) return {cudaErrorInvalidConfiguration, "the grid is too large"};
  if (b.x * b.y * b.z > 1024 || b.x > 1024 || b.y > 1024 || b.z > 64)
    return {cudaErrorInvalidConfiguration, "the block is too large"};
  const auto opted = machine().opted_in.find({kernel, machine().current});
  const int allowed = opted == machine().opted_in.end() ? kWithoutOptIn : opted->second;
  if (config.dynamicSmemBytes > static_cast<std::size_t>(allowed))
    return {cudaErrorInvalidValue, std::to_string(config.dynamicSmemBytes) + " bytes of shared memory, allowed are " +
                                       std::to_string(allowed)};
  if (here.streams.count(config.stream) == 0)
    return {cudaErrorInvalidResourceHandle, "the stream is not of the current device"};
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization && device.arch < 90 &&
        config.attrs[i].val.programmaticStreamSerializationAllowed)
      return {cudaErrorNotSupported, "programmatic dependent launch before compute capability 9.0"};
  return {cudaSuccess, ""};
}

}  // namespace

extern "C" {

// ---- registration, when the library is loaded

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  machine().kernels[stub] = demangled(name);
}

// ---- what the stubs of kernels call; ours are launched by cudaLaunchKernelEx alone

unsigned __cudaPopCallConfiguration(dim3*, dim3*, std::size_t*, void*) { std::abort(); }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { std::abort(); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, std::size_t, cudaStream_t) { std::abort(); }

// ---- errors

cudaError_t cudaGetLastError() {
  const int error = machine().last_error;
  machine().last_error = cudaSuccess;
  return static_cast<cudaError_t>(error);
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorLaunchOutOfResources: return "cudaErrorLaunchOutOfResources";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    default: return "an error that is not rehearsed";
  }
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

// ---- devices

cudaError_t cudaGetDevice(int* device) {
  if (const cudaError_t error = armed("cudaGetDevice")) return answer("cudaGetDevice", error);
  *device = machine().current;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  if (const cudaError_t error = armed("cudaDeviceGetAttribute")) return answer("cudaDeviceGetAttribute", error);
  if (!gpu(index)) return answer("cudaDeviceGetAttribute", cudaErrorInvalidDevice);
  if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) {
    *value = gpu(index)->device->smem_per_block;
    return cudaSuccess;
  }
  if (attribute != cudaDevAttrClockRate && attribute != cudaDevAttrMemoryClockRate)
    return answer("cudaDeviceGetAttribute", cudaErrorInvalidValue, "an attribute that is not rehearsed");
  *value = 1'500'000;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
  if (const cudaError_t error = armed("cudaGetDeviceProperties")) return answer("cudaGetDeviceProperties", error);
  const Gpu* here = gpu(index);
  if (!here) return answer("cudaGetDeviceProperties", cudaErrorInvalidDevice);
  const Device& device = *here->device;
  *properties = cudaDeviceProp{};
  std::strncpy(properties->name, std::string(device.reported_name).c_str(), sizeof properties->name - 1);
  properties->major = device.arch / 10;
  properties->minor = device.arch % 10;
  properties->multiProcessorCount = device.sms;
  properties->memoryBusWidth = 5120;
  properties->l2CacheSize = static_cast<int>(device.l2_bytes);
  properties->sharedMemPerBlockOptin = static_cast<std::size_t>(device.smem_per_block);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  if (const cudaError_t error = armed("cudaStreamIsCapturing")) return answer("cudaStreamIsCapturing", error);
  *status = machine().capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// ---- kernels

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  if (const cudaError_t error = armed("cudaFuncGetAttributes")) return answer("cudaFuncGetAttributes", error);
  if (machine().kernels.count(kernel) == 0) return answer("cudaFuncGetAttributes", cudaErrorInvalidDeviceFunction);
  *attributes = cudaFuncAttributes{};
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (const cudaError_t error = armed("cudaFuncSetAttribute")) return answer("cudaFuncSetAttribute", error);
  const Gpu* here = gpu(machine().current);
  if (machine().kernels.count(kernel) == 0) return answer("cudaFuncSetAttribute", cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > here->device->smem_per_block)
    return answer("cudaFuncSetAttribute", cudaErrorInvalidValue, "more shared memory than a block has here");
  machine().opted_in[{kernel, machine().current}] = value;
  machine().log.push_back("opt-in " + machine().kernels[kernel] + " device " + std::to_string(machine().current) + " " +
                          std::to_string(value));
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  if (const cudaError_t error = armed("cudaLaunchKernelExC")) return answer("cudaLaunchKernelExC", error);
  const Gpu& here = *gpu(machine().current);
  const auto [error, why] = refusal(*config, kernel, here);
  if (error != cudaSuccess) return answer("cudaLaunchKernelExC", error, why);
  const std::string& name = machine().kernels[kernel];
  bool dependent = false;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    dependent |= config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization;
  const unsigned grid[3] = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
  const unsigned block[3] = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
  machine().log.push_back("launch " + name + " device " + std::to_string(machine().current) + " grid " +
                          std::to_string(grid[0]) + "x" + std::to_string(grid[1]) + " block " +
                          std::to_string(block[0]) + "x" + std::to_string(block[1]) + " shared " +
                          std::to_string(config->dynamicSmemBytes) + " stream " +
                          std::to_string(std::distance(here.streams.begin(), here.streams.find(config->stream))) +
                          (dependent ? " dependent" : ""));
  const std::string problem = shrank::rehearsal::run_kernel(name, arguments[0], grid, block, config->dynamicSmemBytes);
  // The real one would report it later, and to everybody: here to the caller, who then names it.
  if (!problem.empty()) return answer("cudaLaunchKernelExC", cudaErrorLaunchFailure, problem);
  return cudaSuccess;
}

}  // extern "C"
