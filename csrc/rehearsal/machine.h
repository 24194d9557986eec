// A machine with GPUs that does not exist: what the stand-ins for the CUDA runtime and for libtorch_cuda answer from.
// Tests drive it through the C functions below, from Python by ctypes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "../select/device.h"

namespace shrank::rehearsal {

struct Gpu {
  const Device* device;
  const void* stream;  // the current one
  std::set<const void*> streams;
};

struct Fault {
  int error;
  int calls;   // that still fail
  int before;  // calls that go well first
};

struct Machine {
  std::vector<Gpu> gpus;
  int current = 0;      // the device of the calling thread
  int tensors_on = 0;   // every tensor is said to be on this device
  bool capturing = false;
  int last_error = 0;   // as cudaGetLastError gives it
  std::map<std::string, Fault> faults;                     // by the function that fails
  std::map<const void*, std::string> kernels;              // host stub -> demangled name
  std::map<std::pair<const void*, int>, int> opted_in;     // (host stub, device) -> bytes of dynamic shared memory
  std::vector<std::string> log;
};

Machine& machine();
void reset(const std::vector<std::string>& gpus);

// The kernel of this name, from the bytes of its parameters, in the emulator. "" or what is wrong with the launch or
// with what the kernel does.
std::string run_kernel(const std::string& name, const void* params, const unsigned (&grid)[3],
                       const unsigned (&block)[3], std::size_t shared_bytes);

}  // namespace shrank::rehearsal
