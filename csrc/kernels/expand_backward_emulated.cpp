#include "expand_backward_emulated.h"

#include <stdexcept>

#include "../select/with_tile.h"
#include "expand_backward.cuh"

namespace shrank {
namespace {

std::vector<emulator::Buffer> buffers_of(const ExpandBackwardParams& p, const LinearGrid& grid) {
  std::vector<emulator::Buffer> buffers;
  const auto add = [&](const char* name, const void* base, int64_t rows, int64_t columns, int width, bool writable) {
    if (base) buffers.push_back({name, base, static_cast<std::size_t>(rows * columns * width), writable, true});
  };
  const int width = bytes(p.dtype);
  add("grad", p.grad, p.M, p.N, width, false);
  for (int i = 0; i < grid.tile.pairs(); i++) {
    const Pair& of = p.pair[i];
    add("h", of.h, p.M, of.R, width, false);
    const int others = grid.tile.form == Form::pivoted ? p.N - of.R : p.N;
    add("up", of.up, others, of.R, width, false);
    add("bias", of.bias, 1, others, width, false);
    add("pivot_bias", of.pivot_bias, 1, of.R, width, false);
    add("order", of.order, 1, p.N, sizeof(int32_t), false);
    add("dz", p.dz[i], p.M, p.N, width, true);
    add("sums", p.sums[i], backward_sum_rows(grid), p.N, sizeof(float), true);
  }
  return buffers;
}

template <typename T, const auto& TILES>
emulator::Result emulate(const ExpandBackwardParams& params, const LinearGrid& grid, const emulator::Options& options) {
  const emulator::Index3 blocks{static_cast<unsigned>(grid.blocks_m), static_cast<unsigned>(grid.blocks_n), 1};
  emulator::Result result;
  const bool found = with_tile<TILES>(grid.tile, [&](auto tile) {
    result = emulator::launch<ExpandBackward<T, tile().block_m, tile().max_rank, number_of(tile().form)>>(
        "expand_backward", blocks, params, buffers_of(params, grid), options);
  });
  if (!found) throw std::invalid_argument("no expand_backward kernel has this tile");
  return result;
}

}  // namespace

emulator::Result emulate_expand_backward(const ExpandBackwardParams& params, const LinearGrid& grid,
                                         const emulator::Options& options) {
  const auto emulate_on = [&](auto element) {
    using T = decltype(element);
    switch (grid.tile.form) {
      case Form::plain: return emulate<T, kBackwardTiles>(params, grid, options);
      case Form::gated: return emulate<T, kGatedBackwardTiles>(params, grid, options);
      case Form::pivoted: return emulate<T, kPivotedBackwardTiles>(params, grid, options);
      case Form::gated_pivoted: break;
    }
    throw std::invalid_argument("no expand_backward kernel has this form");
  };
  if (params.dtype == Dtype::bfloat16) return emulate_on(arch::bfloat16{});
  if (params.dtype == Dtype::float16) return emulate_on(arch::float16{});
  throw std::invalid_argument("expand_backward takes float16 and bfloat16");
}

}  // namespace shrank
