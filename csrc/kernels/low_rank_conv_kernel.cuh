// Which kernel a tile of select is.
#pragma once

#include <type_traits>
#include <utility>

#include "depthwise.cuh"
#include "low_rank_conv.cuh"

namespace shrank {

template <typename T, std::size_t I> struct ConvKernelOf {
  static constexpr ConvTile kTile = kConvTiles[I];
  using type = std::conditional_t<kTile.gather == Gather::depthwise,
                                  LowRankDepthwise<T, kTile.tile.block_m, kTile.tile.max_rank>,
                                  LowRankConv<T, kTile.gather, kTile.tile.block_m, kTile.tile.max_rank>>;
};

// Calls visit with the type of the tile's kernel, wrapped; false if there is none.
template <typename T, typename Visit, std::size_t... I>
bool with_conv_kernel(const ConvTile& tile, const Visit& visit, std::index_sequence<I...>) {
  return ((tile == kConvTiles[I] && (visit(ConvKernelOf<T, I>{}), true)) || ...);
}

template <typename T, typename Visit> bool with_conv_kernel(const ConvTile& tile, const Visit& visit) {
  return with_conv_kernel<T>(tile, visit, std::make_index_sequence<kConvTiles.size()>{});
}

}  // namespace shrank
