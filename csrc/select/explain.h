// The decision for people and tools, as JSON.
#pragma once

#include <string>

#include "conv_problem.h"
#include "device.h"
#include "linear_problem.h"

namespace shrank {

std::string explain(const LinearProblem& p, const Device& d);
std::string explain(const ConvProblem& p, const Device& d);

}  // namespace shrank
