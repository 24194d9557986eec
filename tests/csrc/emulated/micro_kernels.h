// Small kernels, each with at most one mistake, for the emulator's own tests.
#pragma once

#include <string>
#include <vector>

#include "../../../csrc/emulator/launch.h"

namespace shrank::micro {

inline constexpr int kNumbers = 1024;  // of input and output

std::vector<std::string> names();

// Throws std::invalid_argument if no kernel has this name.
emulator::Result run(const std::string& name, const uint32_t* input, uint32_t* output,
                     const emulator::Options& options);

}  // namespace shrank::micro
