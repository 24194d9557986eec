// Which kernel a tile of select is.
#pragma once

#include <type_traits>

#include "../select/with_tile.h"
#include "depthwise.cuh"
#include "low_rank_conv.cuh"

namespace shrank {

template <typename T, Gather GATHER, int BLOCK_M, int MAX_RANK> struct ConvKernelOf {
  using type = std::conditional_t<GATHER == Gather::depthwise, LowRankDepthwise<T, BLOCK_M, MAX_RANK>,
                                  LowRankConv<T, GATHER, BLOCK_M, MAX_RANK>>;
};

// Calls visit with the type of the tile's kernel, wrapped; false if there is none.
template <typename T, typename Visit> bool with_conv_kernel(const ConvTile& tile, const Visit& visit) {
  return with_tile<kConvTiles>(
      tile, [&](auto known) { visit(ConvKernelOf<T, known().gather, known().tile.block_m, known().tile.max_rank>{}); });
}

}  // namespace shrank
