// The small kernels for sm_90a by name, for the emulator's own tests.
#pragma once

#include <string>
#include <vector>

#include "../../../csrc/emulator/launch.h"

namespace shrank::tests {

std::vector<std::string> hopper_micro_names();

// input: 64 rows of 64 bfloat16; output: 128 numbers. Throws std::invalid_argument if no kernel has this name.
emulator::Result run_hopper_micro(const std::string& name, const uint32_t* input, float* output,
                                  const emulator::Options& options);

}  // namespace shrank::tests
