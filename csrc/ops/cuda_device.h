// What the CUDA runtime knows of a GPU, in the terms of select.
#pragma once

#include "../select/device.h"

namespace shrank {

// Asked once per device. Throws if there is no such device.
const Device& cuda_device(int index);

// Whether a graph is recorded on this stream.
bool is_capturing(void* stream);

}  // namespace shrank
