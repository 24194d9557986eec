// On which tile and grid the matrix kernels (kernels/low_rank_linear.cuh) run a problem, and what that costs.
#pragma once

#include <cstddef>
#include <vector>

#include "device.h"
#include "linear_problem.h"
#include "linear_tile.h"

namespace shrank {

inline constexpr int kMaxShares = 64;  // of the columns of y
inline constexpr const char* kWrongShares = "the shares of the columns must be 1 to 64";

struct PlannedGrid {
  LinearGrid grid;
  double microseconds;  // of this kernel alone, in a replayed graph
};

// nullptr, or why the kernel cannot run. fused: from x; else expand: from an h that cuBLAS computes.
const char* linear_why_not(const LinearProblem& p, const Device& d, bool fused);

// nullptr, or why the kernel cannot run the problem on this tile in this many shares of columns. A tile need not be the
// one that select would take.
const char* linear_why_not(const LinearProblem& p, const Device& d, bool fused, const LinearTile& tile, int64_t shares);

// On this tile, which must be allowed.
LinearGrid linear_grid_of(const LinearProblem& p, const LinearTile& tile, int shares);

// The `most` cheapest by the same measure, the cheapest first.
std::vector<PlannedGrid> linear_grids(const LinearProblem& p, const Device& d, bool fused, std::size_t most);

// The cheapest for training and inference together, so that both give the same bits. The problem must be one that
// linear_why_not allows.
PlannedGrid linear_grid(const LinearProblem& p, const Device& d, bool fused);

}  // namespace shrank
