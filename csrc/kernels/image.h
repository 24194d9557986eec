// Whether this binary has code for a GPU.
#pragma once

#include <string>

namespace shrank {

// Empty, or what the CUDA runtime says of a kernel on the current device: all are compiled for the same architectures.
std::string why_no_image();

}  // namespace shrank
