// A low-rank layer on a few rows, such as the tokens of a decoding step: two launches, both of which stream weights. A
// gated layer as well.
#pragma once

#include "../select/linear_problem.h"
#include "../select/shrink_expand_tile.h"
#include "pair.h"

namespace shrank {

// All row-major, contiguous and aligned to 16 bytes; K and N are multiples of 8.
struct ShrinkExpandParams {
  const void* x;         // (M, K)
  Pair pair[2];  // the layer's, or gate and value; h: between the launches where there is one split; else null, or
  // written for training
  float* sums[2];  // (splits, M, R), of each pair: of each split of K, its part of h; null where there is one split
  const void* residual;  // (M, N) or null, as of a gated layer
  void* y;  // (M, N)
  int M, K, N, splits;
  Dtype dtype;  // float16 or bfloat16
  Activation activation;  // of a gated layer of the gate
};

// What a tile does not say of its launches: blocks of the first for the rows of all down, and the larger rank, by which the
// second wants shared memory.
inline int64_t shrink_blocks(const ShrinkExpandParams& params, const ShrinkExpandTile& tile) {
  int64_t blocks = 0;
  for (int i = 0; i < tile.pairs; i++) blocks += ShrinkExpandTile::shrink_blocks(params.pair[i].R);
  return blocks;
}
inline int most_rank(const ShrinkExpandParams& params, const ShrinkExpandTile& tile) {
  int most = 0;
  for (int i = 0; i < tile.pairs; i++) most = params.pair[i].R > most ? params.pair[i].R : most;
  return most;
}

// Rounds as low_rank_linear does, always in the same order. `dependent`: as there; the second launch may also start
// before the first one ends.
void launch_shrink_expand(const ShrinkExpandParams& params, const ShrinkExpandTile& tile, bool dependent, void* stream);

}  // namespace shrank
