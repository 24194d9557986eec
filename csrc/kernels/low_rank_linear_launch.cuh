// One file for each element type and form of the layer, so that ninja compiles them side by side.
#pragma once

#include "../select/with_tile.h"
#include "launch.cuh"
#include "low_rank_linear.cuh"

namespace shrank {

// On one of TILES.
template <typename T, const auto& TILES>
void launch_linear(const LowRankLinearParams& params, const LinearGrid& grid, bool dependent, void* stream) {
  const dim3 blocks(static_cast<unsigned>(grid.blocks_m), static_cast<unsigned>(grid.blocks_n));
  const bool found = with_tile<TILES>(grid.tile, [&](auto tile) {
    launch<LowRankLinear<T, tile().block_m, tile().max_rank, number_of(tile().form)>>("low_rank_linear", blocks, params,
                                                                                      dependent, stream);
  });
  if (!found) throw std::runtime_error("shrank: low_rank_linear was not compiled for the tile that select chose");
}

using LaunchLinear = void(const LowRankLinearParams&, const LinearGrid&, bool, void*);
extern template LaunchLinear launch_linear<arch::bfloat16, kLinearTiles>;
extern template LaunchLinear launch_linear<arch::float16, kLinearTiles>;
extern template LaunchLinear launch_linear<arch::bfloat16, kGatedTiles>;
extern template LaunchLinear launch_linear<arch::float16, kGatedTiles>;
extern template LaunchLinear launch_linear<arch::bfloat16, kPivotedTiles>;
extern template LaunchLinear launch_linear<arch::float16, kPivotedTiles>;

}  // namespace shrank
