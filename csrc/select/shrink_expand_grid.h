// On which tile and in how many splits of K the kernels for a few rows (kernels/shrink_expand.cuh) run, and what that
// costs.
#pragma once

#include <cstddef>
#include <vector>

#include "device.h"
#include "linear_grid.h"
#include "linear_problem.h"
#include "shrink_expand_tile.h"

namespace shrank {

// As a LinearGrid: the tile's block_m are the tokens, blocks_m their groups, and blocks_n the splits of K.
ShrinkExpandTile shrink_expand_tile_of(const LinearGrid& grid);

// nullptr, or why the kernels cannot run.
const char* shrink_expand_why_not(const LinearProblem& p, const Device& d);

// nullptr, or why they cannot run the problem on this tile, whose max_rank says nothing, in this many splits.
const char* shrink_expand_why_not(const LinearProblem& p, const Device& d, const LinearTile& tile, int64_t splits);

LinearGrid shrink_expand_grid_of(const LinearProblem& p, const LinearTile& tile, int splits);

// The `most` cheapest, the cheapest first. The problem must be one that shrink_expand_why_not allows.
std::vector<PlannedGrid> shrink_expand_grids(const LinearProblem& p, const Device& d, std::size_t most);

// Bytes of weights that an SM has on their way while the kernels stream them: by Little's law, it needs its share of the
// bandwidth times the latency, bytes_needed_in_flight, unless its share of all the weights is less.
double bytes_in_flight(const LinearProblem& p, const Device& d, const LinearGrid& grid);
double bytes_needed_in_flight(const LinearProblem& p, const Device& d);

}  // namespace shrank
