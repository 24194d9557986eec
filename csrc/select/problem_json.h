// Problems as JSON: what explain shows, and what a tuner is asked to measure.
#pragma once

#include <string>

#include "conv_problem.h"
#include "linear_problem.h"

namespace shrank {

std::string problem_json(const LinearProblem& p);
std::string problem_json(const ConvProblem& p);

}  // namespace shrank
