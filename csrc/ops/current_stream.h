// Where PyTorch says which stream is current: a function of libtorch_cuda.so, which need not be there.
#pragma once

#include <cstdint>

namespace shrank {

// Writes the current stream of a device; anything but 0 is an error. As torch's shim.h has it where torch has CUDA.
using CurrentStream = int32_t (*)(int32_t device_index, void** stream);

// Throws std::runtime_error if no libtorch_cuda.so is loaded.
CurrentStream find_current_stream();

}  // namespace shrank
