#pragma once

#include <vector>

#include "results.h"

namespace shrank::conformance {

// All instructions on the emulator. Throws std::runtime_error if it has a complaint.
std::vector<Result> run_emulated();

}  // namespace shrank::conformance
