#include "../select/with_tile.h"
#include "expand_backward.cuh"
#include "launch.cuh"

namespace shrank {
namespace {

template <typename T, const auto& TILES>
void launch_tile(const ExpandBackwardParams& params, const LinearGrid& grid, bool dependent, void* stream) {
  const dim3 blocks(static_cast<unsigned>(grid.blocks_m), static_cast<unsigned>(grid.blocks_n));
  const bool found = with_tile<TILES>(grid.tile, [&](auto tile) {
    launch<ExpandBackward<T, tile().block_m, tile().max_rank, number_of(tile().form)>>("expand_backward", blocks,
                                                                                       params, dependent, stream);
  });
  if (!found) throw std::runtime_error("shrank: expand_backward was not compiled for the tile that select chose");
}

}  // namespace

void launch_expand_backward(const ExpandBackwardParams& params, const LinearGrid& grid, bool dependent, void* stream) {
  if (params.M == 0 || params.N == 0) return;
  const auto launch = [&](auto element) {
    using T = decltype(element);
    switch (grid.tile.form) {
      case Form::plain: return launch_tile<T, kBackwardTiles>(params, grid, dependent, stream);
      case Form::gated: return launch_tile<T, kGatedBackwardTiles>(params, grid, dependent, stream);
      case Form::pivoted: return launch_tile<T, kPivotedBackwardTiles>(params, grid, dependent, stream);
      case Form::gated_pivoted: break;
    }
    throw std::runtime_error("shrank: expand_backward takes gate and value with all rows of up");
  };
  if (params.dtype == Dtype::bfloat16) return launch(arch::bfloat16{});
  if (params.dtype == Dtype::float16) return launch(arch::float16{});
  throw std::runtime_error("shrank: expand_backward takes float16 and bfloat16, not " +
                           std::string(name_of(params.dtype)));
}

}  // namespace shrank
