// From a tile that was chosen at run time to the one that is compiled: as a type, so that it can be a template's argument.
#pragma once

#include <cstddef>

namespace shrank {

// Its call gives tile I of the array.
template <const auto& TILES, std::size_t I> struct TileOf {
  constexpr auto operator()() const { return TILES[I]; }
};

// Calls visit with the TileOf of the array that equals `tile`; false if there is none.
template <const auto& TILES, std::size_t I = 0, typename Tile, typename Visit>
bool with_tile(const Tile& tile, const Visit& visit) {
  if constexpr (I == TILES.size()) return false;
  else if (tile == TILES[I]) return visit(TileOf<TILES, I>{}), true;
  else return with_tile<TILES, I + 1>(tile, visit);
}

}  // namespace shrank
