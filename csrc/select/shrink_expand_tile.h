// The shapes in which the kernels for a few rows are compiled: what select may choose, what kernels/shrink_expand.cuh
// takes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "linear_tile.h"

namespace shrank {

// Weights are the 16-row operand of the tensor cores, and go from global memory straight to registers. A warp has kRows
// rows of a factor.
struct ShrinkExpandTile {
  int tokens;  // rows of x, a multiple of 8, which is the other operand's; of more, other blocks read the weights again
  Form form = Form::plain;  // of two pairs, a warp of the second kernel has the same rows of both
  int layers = 1;  // of one x, each with blocks of its own

  static constexpr int kMostLayers = 3;
  constexpr int pairs() const { return pairs_of(form); }
  constexpr Form shrink_form() const { return is_gated(form) ? Form::gated : Form::plain; }  // pivots are up's affair
  constexpr int parts() const { return pairs() * layers; }

  static constexpr int kRows = 16;
  static constexpr int kChunk = 32;  // columns of a weight that a warp loads at a time, 8 for each of 4 lanes
  // Chunks that are asked for together; two batches are on their way. Beside the rows of more tokens, registers hold half.
  constexpr int shrink_batch() const { return tokens <= 8 ? 4 : 2; }
  constexpr int expand_batch() const { return shrink_batch() / pairs(); }  // of each pair
  constexpr int bytes_in_flight() const { return 2 * shrink_batch() * kChunk * kRows * 2; }  // of a warp
  // The warps of a block of the first kernel share the columns of its rows, those of the second have rows of their own.
  static constexpr int kShrinkWarps = 8, kExpandWarps = 4;
  static constexpr int kShrinkThreads = 32 * kShrinkWarps, kExpandThreads = 32 * kExpandWarps;
  static constexpr int kExpandRows = kRows * kExpandWarps;

  // Blocks of the second kernel that registers are left for on an SM.
  static constexpr int kExpandBlocks = 3;

  // h lies in shared memory, each row with zeros up to the end of two batches and a gap behind it, so that neighbouring
  // rows are half of the banks apart.
  static constexpr int kHColumns = 2 * 4 * kChunk, kHGap = 64;
  static constexpr int kMaxRank = 2048;
  constexpr int shrink_bytes() const { return kShrinkWarps * kRows * tokens * 4; }  // the sums of the warps
  constexpr int expand_bytes(int rank = kMaxRank) const {  // of two pairs the larger rank
    return pairs() * tokens * ((rank + kHColumns - 1) / kHColumns * kHColumns * 2 + kHGap);
  }

  // Blocks of either kernel for the rows of its factor, and groups of rows of x, each of which has blocks of its own.
  static constexpr int64_t shrink_blocks(int64_t R) { return (R + kRows - 1) / kRows; }
  static constexpr int64_t expand_blocks(int64_t N) { return (N + kExpandRows - 1) / kExpandRows; }
  constexpr int64_t groups(int64_t M) const { return (M + tokens - 1) / tokens; }

  constexpr bool operator==(const ShrinkExpandTile& other) const {
    return tokens == other.tokens && form == other.form && layers == other.layers;
  }
};

// Of several layers, those of a pivoted tile may be pivoted or not.
inline constexpr std::array<ShrinkExpandTile, 12> kShrinkExpandTiles{{
    {8},
    {16},
    {8, Form::gated},
    {16, Form::gated},
    {8, Form::pivoted},
    {16, Form::pivoted},
    {8, Form::gated_pivoted},
    {16, Form::gated_pivoted},
    {8, Form::plain, ShrinkExpandTile::kMostLayers},
    {16, Form::plain, ShrinkExpandTile::kMostLayers},
    {8, Form::pivoted, ShrinkExpandTile::kMostLayers},
    {16, Form::pivoted, ShrinkExpandTile::kMostLayers},
}};

}  // namespace shrank
