// One file for each element type, so that ninja compiles them side by side.
#pragma once

#include "../select/with_tile.h"
#include "launch.cuh"
#include "low_rank_linear.cuh"

namespace shrank {

template <typename T>
void launch_linear(const LowRankLinearParams& params, const LinearGrid& grid, bool dependent, void* stream) {
  const dim3 blocks(static_cast<unsigned>(grid.blocks_m), static_cast<unsigned>(grid.blocks_n));
  const bool found = with_tile<kLinearTiles>(grid.tile, [&](auto tile) {
    launch<LowRankLinear<T, tile().block_m, tile().max_rank>>("low_rank_linear", blocks, params, dependent, stream);
  });
  if (!found) throw std::runtime_error("shrank: low_rank_linear was not compiled for the tile that select chose");
}

extern template void launch_linear<arch::bfloat16>(const LowRankLinearParams&, const LinearGrid&, bool, void*);
extern template void launch_linear<arch::float16>(const LowRankLinearParams&, const LinearGrid&, bool, void*);

}  // namespace shrank
