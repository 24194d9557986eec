// The decision for people and tools, as JSON.
#pragma once

#include <string>

#include "conv_problem.h"
#include "device.h"
#include "linear_problem.h"

namespace shrank {

std::string explain(const LinearProblem& p, const Device& d);

// Everything that may run, as a list: kernel, predicted microseconds, reason and grid; of matrix kernels the `most`
// cheapest grids.
std::string list_choices(const LinearProblem& p, const Device& d, std::size_t most);
std::string list_choices(const ConvProblem& p, const Device& d, std::size_t most);
std::string explain(const ConvProblem& p, const Device& d);

}  // namespace shrank
