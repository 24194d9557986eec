// A low-rank layer on a few rows, such as the tokens of a decoding step: two launches, both of which stream weights. A
// gated layer as well, or several layers of the same x, such as query, key and value.
#pragma once

#include "../select/linear_problem.h"
#include "../select/shrink_expand_tile.h"
#include "pair.h"

namespace shrank {

// A pair of factors on a few rows.
struct FewRowsPair : Pair {  // h: between the launches where there is one split; else null, or written for training
  float* sums;               // (splits, M, R): of each split of K, its part of h; null where there is one split
  int splits;
};

// All row-major, contiguous and aligned to 16 bytes; K and N are multiples of 8.
struct ShrinkExpandParams {
  const void* x;                                    // (M, K)
  FewRowsPair pair[ShrinkExpandTile::kMostLayers];  // the layer's, or gate and value, or one of each layer
  const void* residual;                             // (M, N) or null, as of a gated layer and of several
  void* y[ShrinkExpandTile::kMostLayers];           // (M, N), of each layer
  int N[ShrinkExpandTile::kMostLayers];             // of each layer; 0, with a rank of 0, where there is none
  int M, K;
  Dtype dtype;            // float16 or bfloat16
  Activation activation;  // of a gated layer of the gate
};

// What a tile does not say of its launches: blocks of the first for the rows of all down, and of the second for those of
// all up; the most splits; and the largest rank, by which the second wants shared memory.
struct FewRowsLaunch {
  int64_t shrink_blocks = 0, expand_blocks = 0;
  int splits = 1, rank = 0;

  FewRowsLaunch(const ShrinkExpandParams& params, const ShrinkExpandTile& tile) {
    for (int i = 0; i < tile.parts(); i++) {
      const FewRowsPair& of = params.pair[i];
      shrink_blocks += ShrinkExpandTile::shrink_blocks(of.R);
      splits = of.splits > splits ? of.splits : splits;
      rank = of.R > rank ? of.R : rank;
    }
    for (int i = 0; i < tile.layers; i++) expand_blocks += ShrinkExpandTile::expand_blocks(params.N[i]);
  }
};

// Rounds as low_rank_linear does, always in the same order. `dependent`: as there; the second launch may also start
// before the first one ends.
void launch_shrink_expand(const ShrinkExpandParams& params, const ShrinkExpandTile& tile, bool dependent, void* stream);

}  // namespace shrank
