#pragma once

#include <vector>

#include "../emulator/launch.h"
#include "results.h"

namespace shrank::conformance {

// All instructions on the emulator. Throws std::runtime_error if it has a complaint.
std::vector<Result> run_emulated(const emulator::Options& options = {});

}  // namespace shrank::conformance
