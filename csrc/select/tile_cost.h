// What the steps of the matrix kernels ask of an SM: linear layers and convolutions are made of the same.
#pragma once

#include "conv_tile.h"
#include "kernel_cost.h"
#include "linear_problem.h"
#include "linear_tile.h"

namespace shrank {

// Two panels in shared memory, multiplied into sums of `columns` columns; of two pairs, each has half of them.
Phase products_of(const LinearTile& tile, int columns, int pairs = 1);

// A panel of x and one of down, of 64 numbers each, into the sums of h.
Phase down_step(const LinearTile& tile);

// What a step of a convolution issues beside its products, all warps together: for windows of x, and for filters.
double window_slots(const ConvTile& tile);

// A panel of an h that is there already, into shared memory.
Phase load_step(const LinearTile& tile);

// The sums of h, rounded into panels in shared memory.
Phase rounding_of_h(const LinearTile& tile);

// A panel of each pair's h and one of its up into the sums of a tile of y.
Phase up_step(const LinearTile& tile);

// All of `tiles` column tiles, of a rank; of two pairs the larger one.
Phase up_steps(const LinearTile& tile, double tiles, double rank, double width);
double rank_panels(const LinearTile& tile, double rank);  // of h that meet those of up for a column tile

// A tile of y from its sums: bias, activation, residual, and what training keeps.
Phase end_of(const LinearTile& tile, const LinearProblem& p);

// A tile of gradients from its sums: bias, the activation's derivative, the gradient of y, and sums over rows.
Phase backward_end_of(const LinearTile& tile, const LinearProblem& p);

}  // namespace shrank
