// On which tile and grid the convolution kernels run a problem, and what that costs.
#pragma once

#include <cstddef>
#include <vector>

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

// nullptr, or why the kernels cannot run the problem on this tile in this many shares of columns.
const char* conv_why_not(const ConvProblem& p, const Device& d, const ConvTile& tile, int64_t shares);

// How the first stage reads x, if a kernel runs the problem.
Gather gather_of(const ConvProblem& p);

// On this tile, which must be allowed.
ConvGrid conv_grid_of(const ConvProblem& p, const ConvTile& tile, int shares);

// The `most` cheapest by the same measure, the cheapest first.
std::vector<PlannedConv> conv_grids(const ConvProblem& p, const Device& d, std::size_t most);

// The cheapest for training and inference together, so that both give the same bits. The problem must be one that
// conv_why_not allows.
PlannedConv conv_grid(const ConvProblem& p, const Device& d);

}  // namespace shrank
