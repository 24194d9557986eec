// One file for each element type, so that ninja compiles them side by side.
#pragma once

#include <tuple>
#include <utility>

#include "launch.cuh"
#include "low_rank_linear.cuh"

namespace shrank {

template <typename T, std::size_t... I>
void launch_linear_tile(const LowRankLinearParams& params, const LinearGrid& grid, bool dependent, void* stream,
                        std::index_sequence<I...>) {
  const dim3 blocks(static_cast<unsigned>(grid.blocks_m), static_cast<unsigned>(grid.blocks_n));
  const bool found = ((grid.tile == kLinearTiles[I] &&
                       (launch<LowRankLinear<T, kLinearTiles[I].block_m, kLinearTiles[I].max_rank>>(
                            "low_rank_linear", blocks, params, dependent, stream),
                        true)) ||
                      ...);
  if (!found) throw std::runtime_error("shrank: low_rank_linear was not compiled for the tile that select chose");
}

template <typename T>
void launch_linear(const LowRankLinearParams& params, const LinearGrid& grid, bool dependent, void* stream) {
  launch_linear_tile<T>(params, grid, dependent, stream, std::make_index_sequence<kLinearTiles.size()>{});
}

extern template void launch_linear<arch::bfloat16>(const LowRankLinearParams&, const LinearGrid&, bool, void*);
extern template void launch_linear<arch::float16>(const LowRankLinearParams&, const LinearGrid&, bool, void*);

}  // namespace shrank
