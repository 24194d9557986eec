// On which tile and grid the convolution kernels run a problem, and what that costs.
#pragma once

#include "conv_problem.h"
#include "conv_tile.h"
#include "device.h"

namespace shrank {

struct PlannedConv {
  ConvGrid grid;
  double microseconds;  // in a replayed graph
};

// nullptr, or why the kernels cannot run.
const char* conv_why_not(const ConvProblem& p, const Device& d);

// The cheapest for training and inference together, so that both give the same bits. The problem must be one that
// conv_why_not allows.
PlannedConv conv_grid(const ConvProblem& p, const Device& d);

}  // namespace shrank
